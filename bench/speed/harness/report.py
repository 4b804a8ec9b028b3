"""What the speed suites report: rows, and the same as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from hcma_fast.bench.shared.bootstrap import Estimate
from hcma_fast.bench.shared.clocks import Clocks
from hcma_fast.bench.shared.machine import Machine
from hcma_fast.errors import InputError
from hcma_fast.files import read_file

Label = int | float | str
COMPILED = "plain loop, torch.compile"
"""The row that others are compared with besides their group's first, where a group has it"""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Frozen):
    """One case. Seconds are those of a run, of all its images together."""

    group: str
    name: str
    labels: dict[str, Label]
    images: int
    """that a run makes; for training, samples"""
    preset: str
    weights_hash: str
    load_s: float
    """from the start of its process: imports, weights, engines; what is compiled at load"""
    warm_up_s: float | None
    """of the first run, with what is compiled then; None where there was none"""
    seconds: tuple[float, ...]
    median_s: float
    p10_s: float
    p90_s: float
    p99_s: float
    """of few runs, nearly the longest"""
    images_per_second: float
    """by the median; of latents that are not finished where the labels have ``evaluations``"""
    peak_rss_mib: float
    """of its process, by its end"""
    device_peak_mib: float | None
    """of torch's allocator on the GPU; None on a CPU"""
    figures: dict[str, float]
    """what else was found, by the last run"""
    clocks: Clocks = Clocks()
    """right after the last run, in its process; empty in older results"""
    relative_error: float | None
    """of the result to that of the group's first case, the worst run; None where nothing was
    compared, or it is not finite"""
    max_error: float | None
    """above which the row is void; None where nothing was compared"""
    void: bool
    """the results do not agree: the timings mean nothing, and there is no speed-up"""
    speedup: float | None
    """against the group's first case, per image, the median over the rounds; None if void, or if
    nothing was compared"""
    speedup_interval: tuple[float, float] | None
    """10th and 90th percentile over the rounds"""

    @property
    def key(self) -> tuple[str, ...]:
        """What the same case has in another report."""
        return (self.group, self.name, *(f"{k}={v}" for k, v in sorted(self.labels.items())))


def speedup_over(row: Row, other: Row) -> tuple[float, float, float] | None:
    """How often ``row`` is as fast as another of its group, per image, within a round.

    Returns:
        the median over the rounds, their 10th and 90th percentile; None if one of both is void or
        was not compared with their group's first, or their rounds are not the same.
    """
    for one in (row, other):
        if one.void or one.max_error is None:
            return None
    if row.group != other.group or len(row.seconds) != len(other.seconds):
        return None
    return within_rounds(row.seconds, row.images, other.seconds, other.images)


def within_rounds(
    seconds: Sequence[float], images: int, other: Sequence[float], other_images: int
) -> tuple[float, float, float]:
    """How often as fast as another, per image: median, 10th and 90th percentile over the rounds.

    Both ran each round in the same minutes, so that the i-th seconds of both belong together.
    """
    ratios = (np.array(other) / other_images) / (np.array(seconds) / images)
    low, median, high = np.percentile(ratios, [10, 50, 90]).tolist()
    return median, low, high


class Fit(_Frozen):
    """How the time of a run grows with one quantity: seconds = a * quantity ** exponent, and
    seconds = fixed_s + slope * quantity."""

    axis: str
    sizes: tuple[float, ...]
    median_s: tuple[float, ...]
    exponent: Estimate
    growth: Estimate
    """time at the largest size over that at the smallest"""
    fixed_s: Estimate | None = None
    """of the straight line with the least relative errors; None in results of before it was told"""
    off_line: float | None = None
    """largest relative distance of a median from that line; None for two sizes, which lie on it"""


class Report(_Frozen):
    """One suite."""

    suite: str
    model: str
    device: str
    rounds: int
    quick: bool
    rows: tuple[Row, ...]
    failed: dict[str, str] = {}
    """cases that could not run, and why"""
    left_out: dict[str, str] = {}
    """cases that say nothing on this machine, and why"""
    finished: bool = True
    """False: interrupted, with the rows of the rounds until then"""
    fits: tuple[Fit, ...] = ()
    machine: Machine

    @property
    def void(self) -> list[str]:
        """Names of the rows that do not count."""
        return [f"{row.group}: {row.name}" for row in self.rows if row.void]


class Results(_Frozen):
    """One or more suites, as they are written and compared."""

    command: str
    reports: tuple[Report, ...]


def read_results(path: Path) -> Results:
    """What ``bench run`` wrote.

    Raises:
        InputError: no such file, or not of this kind.
    """
    try:
        return Results.model_validate_json(read_file(path, "the results"))
    except (InputError, ValidationError) as error:
        why = error.what if isinstance(error, InputError) else "it is of another kind"
        raise InputError(
            f"these are no results of hcma-fast bench run: {why}",
            value=str(path),
            remedy="Write some with hcma-fast bench run SUITE --out FOLDER.",
        ) from error


def _line(fit: Fit) -> str:
    if fit.fixed_s is None:
        return "- | -"
    fixed = estimate_text(fit.fixed_s)
    return f"{fixed} | {'-' if fit.off_line is None else f'{fit.off_line:.1%}'}"


def report_markdown(report: Report, against: str = COMPILED) -> str:
    """A table per group, then fits and machine.

    Args:
        against: name of a row that the others of its group are compared with too, in two more
            columns; groups that do not have it have no such columns.
    """
    lines = [f"{report.suite}: {report.model} on {report.device}, {report.rounds} rounds"]
    lines[0] += ", quick sizes: whether it works, not how fast" if report.quick else ""
    lines[0] += "" if report.finished else "; not finished: rows of the rounds so far"
    groups = dict.fromkeys(row.group for row in report.rows)
    for group in groups:
        rows = [row for row in report.rows if row.group == group]
        lines += ["", *_group_lines(group, rows, against)]
    if report.fits:
        lines += [
            "",
            "| seconds grow with | sizes | exponent | 95% interval | largest over smallest "
            "| straight line: fixed seconds | off it by at most |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {fit.axis} | {', '.join(f'{size:g}' for size in fit.sizes)} "
            f"| {fit.exponent.value:.3f} | {interval_text(fit.exponent.interval, '.3f')} "
            f"| {estimate_text(fit.growth)} | {_line(fit)} |"
            for fit in report.fits
        ]
    if report.left_out:
        lines += ["", *(f"Left out: {name}: {why}." for name, why in report.left_out.items())]
    if report.failed:
        lines += ["", *(f"Could not run: {name}: {why}" for name, why in report.failed.items())]
    hashes = {row.weights_hash[:16] for row in report.rows}
    lines += ["", f"{report.machine.line()}; weights {', '.join(sorted(hashes))}."]
    if clocks := _clock_ranges(report.rows):
        lines += ["", f"Right after the last run of each row: {clocks}."]
    return "\n".join(lines)


def _clock_ranges(rows: Sequence[Row]) -> str:
    """Of each clock its values over the rows: a range of numbers, or the words."""
    found = []
    for name in Clocks.model_fields:
        values = {getattr(row.clocks, name) for row in rows} - {None}
        numbers = [value for value in values if isinstance(value, float)]
        if numbers:
            low, high = min(numbers), max(numbers)
            found.append(f"{name} {low:g}" + (f" to {high:g}" if high > low else ""))
        elif values:
            found.append(f"{name} {', '.join(sorted(values))}")
    return ", ".join(found)


def _group_lines(group: str, rows: Sequence[Row], against: str) -> list[str]:
    common = {k: v for k, v in rows[0].labels.items() if all(r.labels.get(k) == v for r in rows)}
    own = list(dict.fromkeys(k for row in rows for k in row.labels if k not in common))
    extra = list(dict.fromkeys(name for row in rows for name in row.figures))
    shared = ", ".join(f"{name} {value}" for name, value in common.items())
    # a run of some evaluations makes no image
    rate = "latents/s" if any("evaluations" in row.labels for row in rows) else "images/s"
    heads = ["", *own, "median, s", "p10", "p90", "p99", rate, "speed-up", "p10 to p90"]
    other = next((row for row in rows[1:] if row.name == against), None)
    heads += [] if other is None else [f"against {against}", "p10 to p90"]
    heads += ["error", "load, s", "first run, s", "peak, MiB"]
    on_gpu = any(row.device_peak_mib is not None for row in rows)
    heads += (["torch on the GPU, peak MiB"] if on_gpu else []) + extra
    lines = [f"{group}{f' ({shared})' if shared else ''}", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        ratio, interval = ("void", "void") if row.void else ("", "")
        if row.speedup is not None:
            ratio, interval = f"{row.speedup:.2f}", interval_text(row.speedup_interval, ".2f")
        error = "" if row.max_error is None else "not finite"
        error = error if row.relative_error is None else f"{row.relative_error:.1e}"
        cells = [row.name, *(str(row.labels.get(name, "")) for name in own)]
        cells += [seconds_text(s) for s in (row.median_s, row.p10_s, row.p90_s, row.p99_s)]
        cells += [f"{row.images_per_second:.3g}", ratio, interval]
        if other is not None:
            found = speedup_over(row, other)
            cells += (
                ["", ""] if found is None else [f"{found[0]:.2f}", interval_text(found[1:], ".2f")]
            )
        cells += [error, f"{row.load_s:.1f}"]
        cells += ["" if row.warm_up_s is None else seconds_text(row.warm_up_s)]
        cells += [f"{row.peak_rss_mib:.0f}"]
        if on_gpu:
            cells += ["" if row.device_peak_mib is None else f"{row.device_peak_mib:.0f}"]
        cells += [f"{row.figures[name]:.4g}" if name in row.figures else "" for name in extra]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def seconds_text(seconds: float) -> str:
    """Three digits or more."""
    return f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.3g}"


def estimate_text(found: Estimate) -> str:
    """``1.234 (1.200 to 1.300)``."""
    interval = f" ({interval_text(found.interval, '.3f')})" if found.interval else ""
    return f"{found.value:.3f}{interval}"


def interval_text(interval: tuple[float, float] | None, form: str) -> str:
    """``1.20 to 1.30``; empty for a single run."""
    if interval is None or interval[0] == interval[1]:
        return ""
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def rows_csv(reports: Sequence[Report]) -> str:
    """All rows as CSV with a header, each with the machine, versions, commit and clocks.

    A column per label, figure, clock and package, empty where a row has none.
    """
    rows = [(report, row) for report in reports for row in report.rows]
    labels = list(dict.fromkeys(name for _, row in rows for name in row.labels))
    figures = list(dict.fromkeys(name for _, row in rows for name in row.figures))
    plain = [name for name in Row.model_fields if name not in ("labels", "figures", "clocks")]
    # the machine's clocks are not those of the row
    where = [name for name in Machine.model_fields if name not in ("versions", "clocks")]
    packages = list(dict.fromkeys(name for report in reports for name in report.machine.versions))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ["suite", "model", "device", "quick", *plain, *labels, *figures, *Clocks.model_fields]
    writer.writerow([*heads, *where, *(f"version {name}" for name in packages)])
    for report, row in rows:
        values = [getattr(row, name) for name in plain]
        # a list in a cell: its numbers with spaces between
        cells = [" ".join(map(str, v)) if isinstance(v, tuple) else v for v in values]
        cells += [row.labels.get(name) for name in labels]
        cells += [row.figures.get(name) for name in figures]
        cells += [getattr(row.clocks, name) for name in Clocks.model_fields]
        cells += [getattr(report.machine, name) for name in where]
        cells += [report.machine.versions.get(name) for name in packages]
        writer.writerow([report.suite, report.model, report.device, report.quick, *cells])
    return text.getvalue()
