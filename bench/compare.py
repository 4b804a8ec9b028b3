"""Two results of ``hcma-fast bench run``, row by row: what has become slower?"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from hcma_fast.bench.bootstrap import Estimate, median_ratio
from hcma_fast.bench.report import Results, Row
from hcma_fast.errors import InputError, UsageError

Key = tuple[str, ...]


class Change(BaseModel):
    """One row of both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: str
    old_s: float
    new_s: float
    ratio: Estimate
    """new over old median, with the 95% interval by bootstrap over the runs"""
    slower: bool
    """the ratio is above the threshold, and its interval above 1"""
    void: bool
    """the new results do not agree with their yardstick"""


class Comparison(BaseModel):
    """All rows of both results; those that only one of them has are named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float
    changes: tuple[Change, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    notes: tuple[str, ...]
    """in what the machines differ"""

    @property
    def failures(self) -> list[str]:
        """Rows that became slower or void."""
        return [change.row for change in self.changes if change.slower or change.void]


def compare_results(old: Results, new: Results, threshold: float = 1.1) -> Comparison:
    """Compare the rows of the same suite, model, device, group, name and labels.

    Raises:
        UsageError: the threshold is not above 0.
        InputError: no row is in both, or a suite is in one result twice.
    """
    if not threshold > 0:
        raise UsageError("the threshold must be above 0", value=threshold, remedy="Use 1.1.")
    before, after = _rows(old), _rows(new)
    common = [key for key in after if key in before]
    if not common:
        raise InputError(
            "these results have no row in common",
            value=f"{len(before)} rows, {len(after)} rows",
            remedy="Run the same suites, with the same model and sizes.",
        )
    changes = []
    for key in common:
        then, now = before[key], after[key]
        ratio = median_ratio(np.array(now.seconds), np.array(then.seconds))
        assert ratio.interval is not None, "it has one by construction"
        slower = ratio.value > threshold and ratio.interval[0] > 1
        changes.append(
            Change(
                row=" ".join(key),
                old_s=then.median_s,
                new_s=now.median_s,
                ratio=ratio,
                slower=slower,
                void=now.void,
            )
        )
    return Comparison(
        threshold=threshold,
        changes=tuple(changes),
        only_old=tuple(" ".join(key) for key in before if key not in after),
        only_new=tuple(" ".join(key) for key in after if key not in before),
        notes=_machine_notes(old, new),
    )


def _rows(results: Results) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for report in results.reports:
        for row in report.rows:
            key = (report.suite, report.model, report.device, *row.key)
            if key in found:
                raise InputError(
                    "this row is in the results twice",
                    value=" ".join(key),
                    remedy="Give results of one run of each suite.",
                )
            found[key] = row
    return found


def _machine_notes(old: Results, new: Results) -> tuple[str, ...]:
    notes = []
    first, second = old.reports[0].machine, new.reports[0].machine
    for name in ("cpu", "cores", "torch_threads", "gpu", "driver", "python", "versions"):
        then, now = getattr(first, name), getattr(second, name)
        if name == "versions":
            names = [k for k in {**then, **now} if then.get(k) != now.get(k)]
            notes += [f"{k}: {then.get(k)}, now {now.get(k)}" for k in names]
        elif then != now:
            notes.append(f"{name}: {then}, now {now}")
    return tuple(notes)


def comparison_markdown(found: Comparison) -> str:
    """A row per row, the slowest first."""
    lines = [
        "| | old, s | new, s | new / old | 95% interval | |",
        "|---|---|---|---|---|---|",
    ]
    for change in sorted(found.changes, key=lambda change: -change.ratio.value):
        low, high = change.ratio.interval or (change.ratio.value,) * 2
        verdict = "void" if change.void else "slower" if change.slower else ""
        lines.append(
            f"| {change.row} | {change.old_s:.4g} | {change.new_s:.4g} "
            f"| {change.ratio.value:.3f} | {low:.3f} to {high:.3f} | {verdict} |"
        )
    lines += [f"Only in the old results: {row}." for row in found.only_old]
    lines += [f"Only in the new results: {row}." for row in found.only_new]
    lines += [f"The machines differ, {note}." for note in found.notes]
    return "\n".join([*lines[:2], *lines[2:]])
