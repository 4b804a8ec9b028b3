"""The soak: judgement of memory and latency, faults that it must survive, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hcma_fast import HCMAPipeline
from hcma_fast.bench.shared.bootstrap import Estimate
from hcma_fast.bench.shared.machine import describe_machine
from hcma_fast.bench.shared.memory import allocated_mib
from hcma_fast.bench.soak.bad_requests import bad_requests, check_refused
from hcma_fast.bench.soak.report import SoakReport, drift, slope_per_hour
from hcma_fast.bench.soak.soak import check_full_disk, load_soak, soak
from hcma_fast.cli.bench.command import bench_app
from hcma_fast.cli.bench.suites import soak_text
from hcma_fast.errors import HcmaError, OutputError, UsageError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.generator import BatchGenerator
from hcma_fast.runtime.request import Request, Result


def test_a_leak_has_a_slope_whose_interval_leaves_out_nought() -> None:
    rng = np.random.default_rng(0)
    times, noise = np.arange(200) * 6.0, rng.standard_normal(200)
    leak = slope_per_hour(times, 500 + 60 * times / 3600 + noise)
    assert leak.interval is not None and leak.interval[0] > 40
    assert leak.value == pytest.approx(60, abs=5)
    flat = slope_per_hour(times, 500 + noise)
    assert flat.interval is not None and flat.interval[0] < 0 < flat.interval[1]


@pytest.mark.skipif(allocated_mib() is None, reason="another C library, or an old one")
def test_what_is_handed_out_is_counted_at_once() -> None:
    before = allocated_mib()
    assert before is not None
    kept = [np.empty(2**17) for _ in range(32)]  # a MiB each, never written to
    during = allocated_mib()
    assert during is not None and during - before == pytest.approx(32, abs=0.5)
    del kept
    assert allocated_mib() == pytest.approx(before, abs=0.5)


@pytest.mark.parametrize("at", [0.2, 0.35, 0.5, 0.65, 0.8])
def test_steps_of_an_allocator_are_no_leak(at: float) -> None:
    """As in the soak of 2026-11-26, whose memory was flat, and 6 MiB more from some round on."""
    rng = np.random.default_rng(0)
    times, noise = np.arange(920) * 0.9, rng.standard_normal(920)
    stepped = slope_per_hour(times, 804 + np.where(times > at * times[-1], 6.0, 0.0) + noise)
    flat = slope_per_hour(times, 445 + 0.3 * noise)
    leak = slope_per_hour(times, 445 + 33 * times / 3600 + 0.3 * noise)
    assert stepped.value > 8
    assert not report(rss_mib_per_hour=stepped, allocated_mib_per_hour=flat).problems
    (problem,) = report(rss_mib_per_hour=stepped, allocated_mib_per_hour=leak).problems
    assert "what is allocated" in problem


def test_neighbours_that_are_alike_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    wander = np.zeros(600)
    for k in range(1, 600):
        wander[k] = 0.98 * wander[k - 1] + rng.standard_normal()
    found = slope_per_hour(np.arange(600.0), wander)
    assert found.interval is not None
    assert found.interval[0] < 0 < found.interval[1]
    single = slope_per_hour(np.arange(600.0), rng.permutation(wander))
    assert single.interval is not None
    wide, narrow = (high - low for low, high in (found.interval, single.interval))
    assert wide > 2 * narrow


def test_drift_is_the_last_third_over_the_first() -> None:
    found = drift(np.array([1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 2.0, 2.0, 2.0]))
    assert found.value == 2 and found.interval == (2, 2)


def report(**changes: object) -> SoakReport:
    found = {
        "model": "tiny",
        "backend": "eager",
        "minutes": 20,
        "rounds": 100,
        "images": 400,
        "refused": {"long": 20, "blank": 10},
        "full_disks": 30,
        "kills": 1,
        "same_image": True,
        "image_sha256": "ab" * 32,
        "seconds": (1.0,) * 90,
        "at_s": tuple(float(i) for i in range(90)),
        "rss_mib": (500.0,) * 90,
        "judged_rounds": 63,
        "rss_mib_per_hour": Estimate(value=1.0, interval=(-2.0, 4.0)),
        "python_blocks": (1_800_000,) * 90,
        "python_blocks_per_hour": Estimate(value=10.0, interval=(-50.0, 70.0)),
        "allocated_mib": (300.0,) * 90,
        "allocated_mib_per_hour": Estimate(value=0.1, interval=(-0.2, 0.4)),
        "latency_drift": Estimate(value=1.01, interval=(0.98, 1.04)),
        "machine": describe_machine(),
    }
    return SoakReport.model_validate(found | changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        # 0.4% in an hour, for certain, is no leak
        ({"allocated_mib_per_hour": Estimate(value=2.0, interval=(1.9, 2.1))}, None),
        ({"allocated_mib_per_hour": Estimate(value=9.0, interval=(-1.0, 20.0))}, None),
        (
            {"allocated_mib_per_hour": Estimate(value=9.0, interval=(8.0, 10.0))},
            "what is allocated (MiB) grows in an hour: +9.0",
        ),
        (
            {"python_blocks_per_hour": Estimate(value=5e4, interval=(4e4, 6e4))},
            "Python's objects grow in an hour: +50,000.0",
        ),
        # resident memory counts where nothing better is known
        ({"rss_mib_per_hour": Estimate(value=60.0, interval=(50.0, 70.0))}, None),
        (
            {
                "allocated_mib": (),
                "allocated_mib_per_hour": None,
                "rss_mib_per_hour": Estimate(value=60.0, interval=(50.0, 70.0)),
            },
            "memory (MiB) grows in an hour: +60.0",
        ),
        ({"latency_drift": Estimate(value=1.2, interval=(1.1, 1.3))}, "over the first: 1.200"),
        ({"same_image": False}, "another image"),
        ({"rss_mib_per_hour": None, "latency_drift": None, "judged_rounds": 7}, None),
    ],
)
def test_what_is_a_problem(changes: dict[str, object], problem: str | None) -> None:
    found = report(**changes)
    assert bool(found.problems) == (problem is not None)
    assert problem is None or problem in found.problems[0]
    assert "30 bad requests refused, of 2 kinds; 30 full disks; 1 process" in soak_text(found)
    judged = found.latency_drift is not None
    assert ("NOT JUDGED: memory and latency. 7 rounds" in soak_text(found)) != judged
    assert (found.not_judged is None) == judged and (
        "Resident memory: " in soak_text(found)
    ) == judged


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"allocated_mib_per_hour": Estimate(value=9.0, interval=(8.0, 10.0))}, None),
        (
            {"allocated_mib_per_hour": Estimate(value=1.0, interval=(-1.0, 20.0))},
            "what is allocated (MiB) grows in an hour: +1.0 (-1.0 to +20.0; the limit is +3.0)",
        ),
        (
            {"latency_drift": Estimate(value=1.0, interval=(0.9, 1.1))},
            "latency, the last third over the first: 1.000 (0.900 to 1.100; the limit is 1.050)",
        ),
    ],
)
def test_what_is_not_shown_is_told(changes: dict[str, object], named: str | None) -> None:
    """An interval that reaches above the limit is no fault, and no proof either."""
    found = report(**changes)
    assert found.not_shown == ([] if named is None else [named])
    assert (f"Not shown to stay: {named}" in soak_text(found)) == (named is not None)


def test_a_finished_soak_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    path.write_text(report().model_dump_json())
    result = CliRunner().invoke(bench_app, ["show", str(path)])
    assert result.exit_code == 0 and result.stdout == soak_text(report()) + "\n"


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    check_full_disk(lambda file: file.write(b"x" * 5000), path)
    assert list(tmp_path.iterdir()) == []
    # what fits is written: the check does not take that for a full disk
    with pytest.raises(HcmaError, match="full disk was no error"):
        check_full_disk(lambda file: file.write(b"x"), path)


KINDS = {bad.what: bad for bad in bad_requests()}


@pytest.mark.parametrize("what", KINDS)
def test_each_kind_of_bad_request_has_its_error(random_components: Components, what: str) -> None:
    generator = BatchGenerator(HCMAPipeline.from_components(random_components))
    good = [Request("a", num_inference_steps=2)]
    check_refused(generator, good, KINDS[what])
    # another error than its own, or the others lost with what fails alone
    with pytest.raises(HcmaError, match="not refused as it must be") as caught:
        check_refused(generator, good, replace(KINDS[what], error=OutputError))
    assert what in str(caught.value) and "OutputError" in str(caught.value)
    other = replace(KINDS[what], alone=not KINDS[what].alone)
    with pytest.raises(HcmaError, match="not refused as it must be"):
        check_refused(generator, good, other)


def test_a_bad_request_that_is_taken_is_found_out(
    random_components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = BatchGenerator(HCMAPipeline.from_components(random_components))
    good, generate = [Request("a", num_inference_steps=2)], generator.generate
    # an image of something else in place of each
    monkeypatch.setattr(generator, "generate", lambda given: generate(good * len(given)))
    for what in ("prompt too long", "negative prompt too long", "latent that diverges"):
        with pytest.raises(HcmaError, match=rf"not refused as it must be \({what}\)"):
            check_refused(generator, good, KINDS[what])


def test_a_bad_request_that_is_refused_late_is_found_out(
    random_components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = BatchGenerator(HCMAPipeline.from_components(random_components))
    good, generate = [Request("a", num_inference_steps=2)], generator.generate

    def one_by_one(given: Sequence[Request]) -> Iterator[Result]:
        for request in given:
            yield from generate([request])

    monkeypatch.setattr(generator, "generate", one_by_one)
    with pytest.raises(HcmaError, match="before anything runs"):
        check_refused(generator, good, KINDS["prompt too long"])


def test_rounds_mix_requests_and_end_with_the_same_image(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    contestant = load_soak(str(random_checkpoint), "eager", 4, str(tmp_path))
    first, figures = contestant.generate(), contestant.figures()
    second, again = contestant.generate(), contestant.figures()
    assert np.array_equal(first, second) and first.shape == (32,)
    assert 1 <= figures["images"] <= 8
    assert (figures["refused: prompt too long"], figures["full_disks"]) == (1, 1)
    assert again["full_disks"] == 0 and not any(name.startswith("refused") for name in again)
    for _ in range(2):
        contestant.generate()
    # another kind the next time
    assert "refused: negative prompt too long" in contestant.figures()
    assert figures["rss_mib"] > 100 and figures["reference_s"] > 0
    assert 1 < figures["allocated_mib"] < figures["rss_mib"]
    assert figures["python_blocks"] > 1e5
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


@pytest.mark.parametrize("arguments", [{"minutes": 0}, {"minutes": -1}, {"max_batch": 0}])
def test_bad_numbers_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        partial(soak, "tiny", **arguments)()


@pytest.mark.slow
def test_command_soaks(random_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    arguments = ["--minutes", "0.2", "--model", str(random_checkpoint), "--backend", "eager"]
    result = CliRunner().invoke(bench_app, ["soak", *arguments, "--json", "--out", str(out)])
    found = json.loads(result.stdout)
    assert found == json.loads(out.read_text())
    assert found["kills"] == 1 and found["same_image"] and found["rounds"] >= 2
    assert sum(found["refused"].values()) == found["full_disks"] >= 2
    assert result.exit_code == 0, result.exception
