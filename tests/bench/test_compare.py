"""bench compare: which rows became slower, are gone, or cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcma_fast.bench.bootstrap import median_ratio
from hcma_fast.bench.compare import compare_results, comparison_markdown
from hcma_fast.bench.report import read_results
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
    assert median_ratio(a[:1], b[:1]).interval == (a[0] / b[0],) * 2


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
    ],
)
def test_slower_rows_are_found(old: Any, new: Any, threshold: float, slower: bool) -> None:
    found = compare_results(
        results(make_row(seconds=old)), results(make_row(seconds=new)), threshold
    )
    (change,) = found.changes
    assert change.ratio.value == pytest.approx(np.median(new) / np.median(old))
    assert change.slower == slower and found.failures == (
        ["latency tiny cpu g a batch=1"] if slower else []
    )


def test_rows_are_matched_by_all_that_names_them() -> None:
    old = results(make_row("a"), make_row("b"), make_row("a", labels={"batch": 2}))
    new = results(make_row("c"), make_row("b", void=True), make_row("a"))
    found = compare_results(old, new)
    assert len(found.changes) == 2
    assert found.failures == ["latency tiny cpu g b batch=1"]
    assert found.only_old == ("latency tiny cpu g a batch=2",)
    assert found.only_new == ("latency tiny cpu g c batch=1",)
    assert found.notes == ()
    page = comparison_markdown(found)
    assert page.count("| void |") == 1 and "Only in the old results: latency tiny" in page


def test_other_machines_are_told() -> None:
    other = MACHINE.model_copy(update={"cpu": "other", "versions": {"torch": "1"}})
    old = results(make_row())
    old = old.model_copy(
        update={"reports": (old.reports[0].model_copy(update={"machine": other}),)}
    )
    notes = compare_results(old, results(make_row())).notes
    assert any(note.startswith("cpu: other, now") for note in notes)
    assert any(note.startswith("torch: 1, now") for note in notes)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row in common"):
        compare_results(results(make_row()), results(make_row(), suite="peers"))
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
    assert "latency tiny cpu g a batch=1" in captured.err
    assert main(["bench", "compare", old, str(tmp_path)]) == 3
