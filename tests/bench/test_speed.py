"""The speed report: turns, ratios, void rows, memory of a child, and the command."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hcma_fast.bench.machine import describe_machine
from hcma_fast.bench.speed import (
    LAYOUT,
    PLAIN,
    Contestant,
    generate_command,
    measure_speed,
    peak_rss_mib,
    time_in_turns,
)
from hcma_fast.cli.bench import bench_app, speed_table
from hcma_fast.errors import HcmaError, UsageError
from hcma_fast.export.build import cached_folder, load_manifest
from hcma_fast.layout import Layout

GOOD = torch.tensor([3.0, 4.0])


def recording(name: str, latents: Tensor, calls: list[str]) -> Contestant:
    def run() -> Tensor:
        calls.append(name)
        return latents

    return run


def test_contestants_take_turns_after_one_warm_up() -> None:
    calls: list[str] = []
    said: list[str] = []
    rows = time_in_turns(
        {name: recording(name, GOOD, calls) for name in "ABC"}, rounds=2, batch=2, say=said.append
    )
    assert calls == list("ABC" * 3)
    assert said[0] == "A, warm-up" and said[-1] == "C, round 2 of 2"
    assert [row.name for row in rows] == list("ABC")
    for row in rows:
        assert len(row.seconds) == 2 and not row.void
        assert row.p10_s <= row.median_s <= row.p90_s
    assert rows[0].speedup == 1 and rows[0].relative_error == 0


def test_seconds_are_per_image_and_speedups_are_ratios_within_a_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a clock that the contestants move on, by another amount in each round
    clock = [0.0]
    monkeypatch.setattr("hcma_fast.bench.speed.time.perf_counter", lambda: clock[0])

    def taking(*durations: float) -> Contestant:
        left = list(durations)

        def run() -> Tensor:
            clock[0] += left.pop(0)
            return GOOD

        return run

    plain, ours = time_in_turns(
        {PLAIN: taking(90, 4, 8, 12), "ours": taking(50, 2, 2, 2)}, rounds=3, batch=4
    )
    assert plain.seconds == (1, 2, 3) and plain.median_s == 2
    assert ours.seconds == (0.5, 0.5, 0.5)
    assert ours.speedup == 4
    assert ours.speedup_interval == pytest.approx((2.4, 5.6))


@pytest.mark.parametrize(
    ("latents", "error"),
    [
        (GOOD * 1.0005, 5e-4),
        (GOOD * 1.01, 1e-2),
        (GOOD * math.nan, None),
        (GOOD * math.inf, None),
    ],
)
def test_a_row_that_does_not_agree_is_void(latents: Tensor, error: float | None) -> None:
    _, row = time_in_turns(
        {"A": recording("A", GOOD, []), "B": recording("B", latents, [])}, rounds=1, batch=1
    )
    assert row.relative_error == (None if error is None else pytest.approx(error, rel=1e-3))
    assert row.void == (error is None or error > 1e-3)
    assert (row.speedup is None) == (row.speedup_interval is None) == row.void


def test_peak_memory_is_the_childs_own() -> None:
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    small = peak_rss_mib([sys.executable, "-S", "-c", "pass"])
    large = peak_rss_mib(
        [sys.executable, "-S", "-c", "b = bytearray(200 * 2**20); b[::4096] = b[::4096]"]
    )
    # torch is loaded in this process: a child that inherited its peak would show it
    assert ours > 150 and small < 60
    assert large == pytest.approx(small + 200, abs=30)


def test_peak_memory_of_a_failing_command_is_an_error_with_its_words() -> None:
    with pytest.raises(HcmaError, match="no such thing"):
        peak_rss_mib([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_the_measured_command_draws_the_scene_that_was_timed(tmp_path: Path) -> None:
    command = generate_command("tiny", "onnxruntime", 7, str(tmp_path))
    boxes = [command[i + 1] for i, part in enumerate(command) if part == "--box"]
    parsed = [Layout.parse_box(text) for text in boxes]
    assert Layout([p for p, _ in parsed], [b for _, b in parsed]) == LAYOUT
    assert command[command.index("--steps") + 1] == "7"


def test_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.cpu and machine.cores >= 1 and machine.memory_gib > 0
    assert machine.versions["torch"] == torch.__version__


@pytest.mark.parametrize("changes", [{"batch": 0}, {"rounds": 0}, {"num_inference_steps": 1}])
def test_bad_numbers_are_refused(random_checkpoint: Path, changes: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        measure_speed(random_checkpoint, backends=["eager"], memory=False, **changes)


def test_report_and_table_on_a_random_checkpoint(random_checkpoint: Path) -> None:
    report = measure_speed(
        random_checkpoint, backends=["eager"], num_inference_steps=3, rounds=1, memory=False
    )
    plain, eager = report.rows
    assert (plain.name, eager.name) == (PLAIN, "hcma-fast eager")
    assert eager.relative_error is not None and 0 < eager.relative_error < 1e-5
    assert report.preset == "random" and report.generate_peak_rss_mib == {}
    table = speed_table(report)
    assert f"| {PLAIN} | {plain.median_s:.3f} |" in table
    assert report.weights_hash[:16] in table and report.machine.cpu in table


def test_command_prints_json_on_stdout_alone(
    random_checkpoint: Path,
    random_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path))
    built = cached_folder(load_manifest(random_engine).weights_hash, "onnxruntime")
    shutil.copytree(random_engine, built)
    arguments = ["--model", str(random_checkpoint), "--steps", "4", "--rounds", "2", "--json"]
    result = CliRunner().invoke(bench_app, ["speed", *arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = [row["name"] for row in report["rows"]]
    assert names == [PLAIN, "hcma-fast eager", "hcma-fast onnxruntime"]
    assert all(len(row["seconds"]) == 2 and not row["void"] for row in report["rows"])
    assert all(row["speedup"] > 0 for row in report["rows"])
    peaks = report["generate_peak_rss_mib"]
    assert set(peaks) == {"eager", "onnxruntime"}
    assert all(50 < mib < 1500 for mib in peaks.values())
    assert "warm-up" in result.stderr
    assert "export" not in result.stderr


def test_command_fails_when_the_latents_do_not_agree(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcma_fast.bench.speed.MAX_ERROR", 0.0)
    arguments = ["--model", str(random_checkpoint), "--backend", "eager", "--no-memory"]
    result = CliRunner().invoke(bench_app, ["speed", *arguments, "--steps", "3", "--rounds", "1"])
    assert isinstance(result.exception, HcmaError) and "void" in str(result.exception)
    assert "| void | void |" in result.stdout
