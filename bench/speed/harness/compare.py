"""Two results of ``hcma-fast bench run``, row by row: what has become slower, or is gone?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict

from hcma_fast.bench.shared.bootstrap import Estimate, median_ratio
from hcma_fast.bench.speed.harness.report import Report, Results, Row
from hcma_fast.errors import InputError, UsageError

Key = tuple[str, ...]
_FEWEST_JUDGED = 3


class Change(BaseModel):
    """One row of both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: str
    old_s: float
    new_s: float
    ratio: Estimate
    """new over old median, with the 95% interval by bootstrap over the runs, if there are five"""
    slower: bool
    """the ratio is above the threshold, and its interval above 1; without one, every run was slower
    than all of before"""
    judged: bool
    """there are three runs of both, which is the fewest that say anything"""
    void: bool
    """the new results do not agree with their yardstick"""


class Missing(BaseModel):
    """A row of the old results that the new ones should have, as they are of its suite too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: str
    why: str
    """what the new results say of it"""


class Comparison(BaseModel):
    """All rows of both results; those that only one of them has are named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float
    changes: tuple[Change, ...]
    missing: tuple[Missing, ...]
    only_old: tuple[str, ...]
    """of suites that the new results do not have"""
    only_new: tuple[str, ...]
    notes: tuple[str, ...]
    """in what else the results differ: machines, versions, weights, rows that were void before"""

    @property
    def failures(self) -> list[str]:
        """Rows that became slower or void, or are gone; each says which."""
        found = [
            f"{change.row}: {'void' if change.void else f'{change.ratio.value:.3f} times as long'}"
            for change in self.changes
            if change.slower or change.void
        ]
        return found + [f"{missing.row}: {missing.why}" for missing in self.missing]


def compare_results(old: Results, new: Results, threshold: float = 1.1) -> Comparison:
    """Compare the rows of the same suite, model, device, group, name and labels.

    Weights may differ, as a preset may be trained again: the notes say so.

    Raises:
        UsageError: the threshold is not above 0.
        InputError: no suite is in both, a row is in one result twice, only one result has quick
            sizes, or a row is of another preset.
    """
    if not threshold > 0:
        raise UsageError("the threshold must be above 0", value=threshold, remedy="Use 1.1.")
    before, after = _rows(old), _rows(new)
    suites = _suites(old).keys() & _suites(new).keys()
    common = [key for key in after if key in before]
    if not suites:
        raise InputError(
            "these results have no row in common",
            value=f"{len(before)} rows, {len(after)} rows",
            remedy="Run the same suites, with the same model and device.",
        )
    _check_sizes(old, new)
    changes = []
    for key in common:
        then, now = before[key], after[key]
        if then.preset != now.preset:
            raise InputError(
                "this row is of another preset in the new results",
                value=f"{' '.join(key)}: {then.preset}, now {now.preset}",
                remedy="Compare results of one model.",
            )
        ratio = median_ratio(np.array(now.seconds), np.array(then.seconds))
        # of few runs all must have been slower: three of three are so by chance in 1 of 20 cases
        sure = ratio.interval[0] > 1 if ratio.interval else min(now.seconds) > max(then.seconds)
        judged = min(len(now.seconds), len(then.seconds)) >= _FEWEST_JUDGED
        # seconds of a void row are of other work
        slower = judged and not then.void and ratio.value > threshold and sure
        changes.append(
            Change(
                row=" ".join(key),
                old_s=then.median_s,
                new_s=now.median_s,
                ratio=ratio,
                slower=slower,
                judged=judged,
                void=now.void,
            )
        )
    return Comparison(
        threshold=threshold,
        changes=tuple(changes),
        missing=tuple(
            Missing(row=" ".join(key), why=_why_missing(row, _suites(new)[key[:3]]))
            for key, row in before.items()
            if key not in after and key[:3] in suites
        ),
        only_old=tuple(" ".join(key) for key in before if key[:3] not in suites),
        only_new=tuple(" ".join(key) for key in after if key not in before),
        notes=(
            *_machine_notes(old, new),
            *_weights_notes(before, after),
            *_void_notes(before, after),
        ),
    )


def _suites(results: Results) -> dict[Key, Report]:
    """By suite, model and device, with which the keys of its rows begin."""
    return {(found.suite, found.model, found.device): found for found in results.reports}


def _check_sizes(old: Results, new: Results) -> None:
    """Quick sizes say whether it works, not how fast: beside others they mean nothing."""
    before = _suites(old)
    for key, now in _suites(new).items():
        if key in before and before[key].quick != now.quick:
            raise InputError(
                "one of these results has quick sizes, the other has not",
                value=" ".join(key),
                remedy="Run both with --quick, or both without it.",
            )


def _why_missing(row: Row, report: Report) -> str:
    reason = report.failed.get(f"{row.group}: {row.name}")
    if reason is None:
        return "it was not run, with this suite among the new results"
    return f"it could not run: {reason}"


def _weights_notes(before: Mapping[Key, Row], after: Mapping[Key, Row]) -> list[str]:
    pairs = [(before[key], now) for key, now in after.items() if key in before]
    changed = {
        (then.preset, then.weights_hash[:16], now.weights_hash[:16])
        for then, now in pairs
        if then.weights_hash != now.weights_hash
    }
    return [f"weights of {preset}: {then}, now {now}" for preset, then, now in sorted(changed)]


def _void_notes(before: Mapping[Key, Row], after: Mapping[Key, Row]) -> list[str]:
    gone = [key for key, now in after.items() if key in before and before[key].void > now.void]
    return [f"{' '.join(key)}: void, now not, so that it is not judged" for key in gone]


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
        found_in = change.ratio.interval
        interval = f"{found_in[0]:.3f} to {found_in[1]:.3f}" if found_in else "too few runs"
        verdict = "void" if change.void else "slower" if change.slower else ""
        verdict = verdict if change.judged or change.void else "not judged"
        lines.append(
            f"| {change.row} | {change.old_s:.4g} | {change.new_s:.4g} "
            f"| {change.ratio.value:.3f} | {interval} | {verdict} |"
        )
    lines += [""] if found.missing or found.only_old or found.only_new or found.notes else []
    lines += [f"Missing: {missing.row}: {missing.why}" for missing in found.missing]
    lines += [f"Only in the old results: {row}." for row in found.only_old]
    lines += [f"Only in the new results: {row}." for row in found.only_new]
    lines += [f"The results differ in {note}." for note in found.notes]
    return "\n".join(lines)
