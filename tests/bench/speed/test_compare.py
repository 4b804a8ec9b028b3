"""bench compare: which rows became slower, are gone, or cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcma_fast.bench.shared.bootstrap import median_ratio
from hcma_fast.bench.speed.harness.compare import compare_results, comparison_markdown
from hcma_fast.bench.speed.harness.report import read_results
from hcma_fast.cli.app import main
from hcma_fast.errors import InputError, UsageError

from bench_rows import MACHINE, make_row, results


def test_ratio_of_medians_and_its_interval() -> None:
    rng = np.random.default_rng(1)
    a, b = 2 + 0.1 * rng.standard_normal(40), 1 + 0.1 * rng.standard_normal(30)
    found = median_ratio(a, b)
    assert found.interval is not None
    low, high = found.interval
    assert low < found.value < high and low < 2 < high and high - low < 0.3
    assert median_ratio(a[:4], b).interval is None and median_ratio(a[:5], b[:5]).interval


NOISY = (1.0, 3.0, 2.0, 1.2, 2.8)


@pytest.mark.parametrize(
    ("old", "new", "threshold", "slower"),
    [
        ((2.0, 2.0, 2.0), (2.0, 2.0, 2.0), 1.1, False),
        ((2.0, 2.1, 1.9), (3.0, 3.1, 2.9), 1.1, True),
        ((2.0, 2.1, 1.9), (3.0, 3.1, 2.9), 1.6, False),
        ((3.0, 3.1, 2.9), (2.0, 2.1, 1.9), 1.1, False),
        # above the threshold, by chance
        (NOISY, tuple(1.2 * s for s in NOISY), 1.1, False),
        ((2.0, 2.1, 1.9), (2.4, 2.0, 2.5), 1.1, False),
        # one or two runs say nothing
        ((2.0,), (2.3,), 1.1, False),
        ((2.0, 2.0), (4.0, 4.0), 1.1, False),
    ],
)
def test_slower_rows_are_found(old: Any, new: Any, threshold: float, slower: bool) -> None:
    found = compare_results(
        results(make_row(seconds=old)), results(make_row(seconds=new)), threshold
    )
    (change,) = found.changes
    assert change.ratio.value == pytest.approx(np.median(new) / np.median(old))
    assert change.slower == slower
    ratio = f"{change.ratio.value:.3f} times as long"
    assert found.failures == ([f"latency tiny cpu g a batch=1: {ratio}"] if slower else [])
    page = comparison_markdown(found)
    assert ("too few runs" in page) == (len(old) < 5) and ("not judged" in page) == (len(old) < 3)


def test_rows_are_matched_by_all_that_names_them() -> None:
    old = results(make_row("a"), make_row("b"), make_row("a", labels={"batch": 2}))
    new = results(make_row("c"), make_row("b", void=True), make_row("a"))
    found = compare_results(old, new)
    assert len(found.changes) == 2
    gone = "it was not run, with this suite among the new results"
    assert found.failures == [
        "latency tiny cpu g b batch=1: void",
        f"latency tiny cpu g a batch=2: {gone}",
    ]
    assert found.only_old == ()
    assert found.only_new == ("latency tiny cpu g c batch=1",)
    assert found.notes == ()
    page = comparison_markdown(found)
    assert page.count("| void |") == 1 and f"Missing: latency tiny cpu g a batch=2: {gone}" in page


def test_a_row_that_fails_now_is_a_regression_and_says_why() -> None:
    old = results(make_row("a"), make_row("b"))
    new = results(make_row("a"), failed={"g: b": "the process of b died (got -9)"})
    why = "latency tiny cpu g b batch=1: it could not run: the process of b died (got -9)"
    assert compare_results(old, new).failures == [why]
    # nor does it help that nothing runs any more
    none = results(failed={"g: a": "x", "g: b": "y"})
    assert len(compare_results(old, none).failures) == 2
    # what could not run before is no loss
    assert compare_results(new, old).failures == []


def test_the_seconds_of_a_void_row_are_no_measure() -> None:
    old = results(make_row(void=True), make_row("b"))
    found = compare_results(old, results(make_row(seconds=(9.0,)), make_row("b")))
    assert found.failures == []
    assert found.notes == ("latency tiny cpu g a batch=1: void, now not, so that it is not judged",)


@pytest.mark.parametrize("change", [{"suite": "peers"}, {"model": "other"}, {"device": "cuda"}])
def test_suites_that_were_not_run_again_are_told_and_no_failure(change: dict[str, str]) -> None:
    old, other = results(make_row()), results(make_row("b"), **change)
    both = old.model_copy(update={"reports": (*old.reports, *other.reports)})
    found = compare_results(both, old)
    assert found.failures == [] and len(found.only_old) == 1
    assert "Only in the old results: " in comparison_markdown(found)


def test_other_machines_are_told() -> None:
    other = MACHINE.model_copy(update={"cpu": "other", "versions": {"torch": "1"}})
    old = results(make_row(), machine=other)
    notes = compare_results(old, results(make_row())).notes
    assert any(note.startswith("cpu: other, now") for note in notes)
    assert any(note.startswith("torch: 1, now") for note in notes)


def test_other_weights_of_a_preset_are_told_once() -> None:
    old = results(*(make_row(name, weights_hash="1" * 64) for name in "ab"))
    found = compare_results(old, results(make_row("a"), make_row("b")))
    note = f"weights of fake: {'1' * 16}, now {'0' * 16}"
    assert found.notes == (note,) and found.failures == []
    assert f"The results differ in {note}." in comparison_markdown(found)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row in common"):
        compare_results(results(make_row()), results(make_row(), suite="peers"))
    with pytest.raises(InputError, match=r"another preset.*fake, now other"):
        compare_results(results(make_row()), results(make_row(preset="other")))
    for quick in (True, False):
        with pytest.raises(InputError, match="quick sizes"):
            compare_results(results(make_row(), quick=quick), results(make_row(), quick=not quick))
    with pytest.raises(InputError, match="twice"):
        compare_results(results(make_row(), make_row()), results(make_row()))
    with pytest.raises(UsageError, match="threshold"):
        compare_results(results(make_row()), results(make_row()), 0)
    (tmp_path / "x.json").write_text('{"reports": 3}')
    for name in ("x.json", "missing.json"):
        with pytest.raises(InputError, match="no results"):
            read_results(tmp_path / name)


def test_compare_command_ends_with_an_error_when_a_row_is_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("old", (1.0, 1.0, 1.0)), ("new", (1.3, 1.3, 1.3))):
        written = results(make_row(seconds=seconds)).model_dump_json()
        (tmp_path / f"{name}.json").write_text(written)
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert main(["bench", "compare", old, old]) == 0
    assert main(["bench", "compare", old, new, "--threshold", "1.5"]) == 0
    assert main(["bench", "compare", new, old]) == 0
    capsys.readouterr()
    assert main(["bench", "compare", old, new, "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["changes"][0]["ratio"]["value"] == pytest.approx(1.3)
    assert "latency tiny cpu g a batch=1: 1.300 times as long" in captured.err
    empty = results(failed={"g: a": "no memory"}).model_dump_json()
    (tmp_path / "empty.json").write_text(empty)
    assert main(["bench", "compare", old, str(tmp_path / "empty.json")]) == 1
    assert "batch=1: it could not run: no memory" in capsys.readouterr().err
    assert main(["bench", "compare", old, str(tmp_path)]) == 3
