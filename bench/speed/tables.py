"""The tables of docs/performance.md, from the results in docs/results.

    python -m hcma_fast.bench.speed.tables docs/results docs/performance.md

writes each table between its two markers, ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hcma_fast.bench.shared.bootstrap import Estimate
from hcma_fast.bench.shared.machine import Machine
from hcma_fast.bench.soak.report import read_soak
from hcma_fast.bench.speed.harness.report import (
    COMPILED,
    Report,
    Row,
    estimate_text,
    interval_text,
    read_results,
    seconds_text,
    speedup_over,
)
from hcma_fast.bench.speed.suites.overhead import GOAL_MS
from hcma_fast.errors import InputError
from hcma_fast.files import read_text, write_whole
from hcma_fast.program import run_program

SOAK = "soak"
"""The one file that is no result of ``bench run``"""
_BLOCK = re.compile(r"(<!-- table ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Column(NamedTuple):
    """A column of a table of rows."""

    head: str
    cell: Callable[[Row], str]


def _speedup(row: Row) -> str:
    """Median and interval; of the row that others are compared with, 1."""
    if row.speedup is None:
        return ""
    interval = interval_text(row.speedup_interval, ".2f")
    return f"{row.speedup:.2f}" + (f" ({interval})" if interval else "")


def _error(row: Row) -> str:
    return f"{row.relative_error:.1e}" if row.relative_error else ""


def _figure(name: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
    return lambda row: format(row.figures[name] * factor, form) if name in row.figures else ""


def _label(name: str) -> Column:
    return Column(name, lambda row: str(row.labels[name]))


def _per_call_ms(row: Row) -> str:
    return f"{row.median_s / int(row.labels['calls']) * 1000:.1f}"


_NAME = Column("", lambda row: row.name)
_SECONDS = Column("seconds", lambda row: seconds_text(row.median_s))
_P10_P90 = Column("p10 to p90", lambda row: interval_text((row.p10_s, row.p90_s), ".3g"))
_P99 = Column("p99", lambda row: seconds_text(row.p99_s))
_SPEEDUP = Column("speed-up (p10 to p90)", _speedup)
_ERROR = Column("error", _error)
_LOAD = Column("load, s", lambda row: f"{row.load_s:.1f}")
_FIRST = Column("first run, s", lambda row: seconds_text(row.warm_up_s) if row.warm_up_s else "")
_PEAK = Column("peak, MiB", lambda row: f"{row.peak_rss_mib:.0f}")
_CALL_MS = Column("ms per call", _per_call_ms)
_GFLOPS = Column("GFLOP/s", _figure("gflops", ".0f"))
_SHARE = Column("share of a large product, %", _figure("share_of_matmul", ".0f", 100))


def _against(rows: Sequence[Row]) -> Column:
    """The speed-up over the row of the loop under torch.compile."""
    (other,) = (row for row in rows if row.name == COMPILED)

    def cell(row: Row) -> str:
        found = speedup_over(row, other)
        return "" if found is None or row is other else f"{found[0]:.2f}"

    return Column("against torch.compile", cell)


def _lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def _rows(rows: Sequence[Row], *columns: Column) -> list[str]:
    cells = ([column.cell(row) for column in columns] for row in rows)
    return _lines([column.head for column in columns], cells)


def _command(command: str) -> str:
    """As it was given, without the folder that it wrote to."""
    words = shlex.split(command)
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return shlex.join(words)


class _Suite(NamedTuple):
    report: Report
    source: list[str]
    """what was run, on which commit and day"""

    def group(self, name: str) -> list[Row]:
        return [row for row in self.report.rows if row.group == name]


def _suite(folder: Path, file: str, suite: str) -> _Suite:
    results = read_results(folder / f"{file}.json")
    (report,) = (report for report in results.reports if report.suite == suite)
    rounds = f"{report.rounds} rounds" if report.rounds > 1 else "1 round"
    return _Suite(report, _source(_command(results.command), rounds, report.machine))


def _source(command: str, extent: str, machine: Machine) -> list[str]:
    return [f"`{command}`, {extent}, {machine.date[:10]}, commit {machine.commit}.", ""]


def _peers(folder: Path, group: str) -> list[str]:
    suite = _suite(folder, "peers", "peers")
    rows = suite.group(group)
    columns = [_NAME, _SECONDS, _P10_P90, _SPEEDUP]
    columns += [_against(rows)] if any(row.name == COMPILED for row in rows) else []
    return suite.source + _rows(rows, *columns, _ERROR, _LOAD, _FIRST, _PEAK)


#: group, name of ours, name of what it is compared with (None: the group's first), the goal
_GOALS: tuple[tuple[str, str, str | None, float], ...] = (
    ("aligned, batch 1", "hcma-fast openvino bfloat16", None, 4.0),
    ("aligned, batch 8", "hcma-fast openvino bfloat16", None, 4.0),
    ("aligned, batch 1", "hcma-fast openvino bfloat16", COMPILED, 1.5),
    ("aligned, batch 1", "hcma-fast onnxruntime", COMPILED, 1.5),
    ("aligned, batch 8", "hcma-fast openvino bfloat16", COMPILED, 1.5),
    ("aligned, batch 8", "hcma-fast openvino", COMPILED, 1.5),
    ("aligned, batch 8", "hcma-fast onnxruntime", COMPILED, 1.5),
)


def _goals(folder: Path) -> list[str]:
    """Speed-ups beside what was aimed at, and the sampler's own cost."""
    suite = _suite(folder, "peers", "peers")
    rows = []
    for group, name, other, goal in _GOALS:
        named = {row.name: row for row in suite.group(group)}
        base = named[other] if other else suite.group(group)[0]
        found = speedup_over(named[name], base)
        if found is not None:
            reached = "yes" if found[0] >= goal else "no"
            what = f"speed-up over the {base.name}"
            rows.append([what, group, name, f"{goal:g}", f"{found[0]:.2f}", reached])
    for row in _suite(folder, "overhead", "overhead").report.rows:
        cost = row.figures["ms_per_step"]
        reached = "yes" if cost <= GOAL_MS else "no"
        rows.append(["ms per step", "no engines", row.name, f"{GOAL_MS:g}", f"{cost:.3f}", reached])
    return _lines(["figure", "case", "of", "goal", "measured", "reached"], rows)


def _latency(folder: Path) -> list[str]:
    suite = _suite(folder, "latency", "latency")
    columns = (_NAME, _SECONDS, _P10_P90, _P99, _SPEEDUP, _ERROR, _LOAD, _FIRST, _PEAK)
    return suite.source + _rows(suite.report.rows, *columns)


def _ladder(folder: Path) -> list[str]:
    suite = _suite(folder, "ladder", "ladder")
    return suite.source + _rows(suite.report.rows, _NAME, _SECONDS, _SPEEDUP, _ERROR)


def _throughput(folder: Path) -> list[str]:
    """A row per group, whose first case is the plain loop."""
    suite = _suite(folder, "throughput", "throughput")
    rows = suite.report.rows
    plain = {row.group: row for row in reversed(rows)}
    ours = [row for row in rows if row is not plain[row.group]]
    columns = [_label("batch"), _label("steps"), _label("boxes")]
    columns += [Column("plain loop, s", lambda row: seconds_text(plain[row.group].median_s))]
    columns += [Column("hcma-fast, s", lambda row: seconds_text(row.median_s))]
    columns += [Column("images/s", lambda row: f"{row.images_per_second:.2f}")]
    return suite.source + _rows(ours, *columns, _SPEEDUP, _ERROR)


def _scaling(folder: Path) -> list[str]:
    suite = _suite(folder, "scaling", "scaling")
    heads = ["seconds grow with", "sizes", "exponent (95%)", "largest over smallest (95%)"]
    heads += ["fixed seconds of a straight line (95%)", "largest distance from the line"]
    rows = [
        [
            fit.axis,
            ", ".join(f"{size:g}" for size in fit.sizes),
            estimate_text(fit.exponent),
            estimate_text(fit.growth),
            estimate_text(fit.fixed_s) if fit.fixed_s else "",
            "" if fit.off_line is None else f"{fit.off_line:.1%}",
        ]
        for fit in suite.report.fits
    ]
    return suite.source + _lines(heads, rows)


def _unet(folder: Path) -> list[str]:
    suite = _suite(folder, "peers", "unet")
    columns = (_NAME, _CALL_MS, _SPEEDUP, _ERROR, _GFLOPS, _SHARE)
    return suite.source + _rows(suite.report.rows, *columns)


def _align(folder: Path) -> list[str]:
    suite = _suite(folder, "align", "align")
    return suite.source + _rows(
        suite.report.rows, _label("batch"), _NAME, _CALL_MS, _SPEEDUP, _ERROR
    )


def _build(folder: Path) -> list[str]:
    suite = _suite(folder, "build", "build")
    columns = [_NAME, Column("seconds", lambda row: f"{row.median_s:.0f}")]
    columns += [Column("peak of the command, MiB", _figure("build_peak_mib", ".0f"))]
    columns += [Column("engines, MiB", _figure("engine_mib", ".0f"))]
    return suite.source + _rows(suite.report.rows, *columns)


def _train(folder: Path, file: str) -> list[str]:
    suite = _suite(folder, file, "train")
    columns = [_NAME, _label("batch")]
    columns += [Column("samples/s", _figure("loop_samples_per_second", ".3g"))]
    columns += [Column("waits for data, %", _figure("data_wait_share", ".1f", 100))]
    return suite.source + _rows(suite.report.rows, *columns, _GFLOPS, _SHARE, _PEAK)


def _overhead(folder: Path) -> list[str]:
    suite = _suite(folder, "overhead", "overhead")
    per_step = Column("ms per step", _figure("ms_per_step", ".3f"))
    return suite.source + _rows(suite.report.rows, _NAME, per_step)


def _soak(folder: Path) -> list[str]:
    path = folder / f"{SOAK}.json"
    found = read_soak(path)
    if found is None or found.not_judged or not found.allocated_mib:
        raise InputError(
            "this is no report of a soak that was judged",
            value=str(path),
            remedy="Write one with hcma-fast bench soak --minutes 20 --out FILE.",
        )
    rows = [
        ["rounds", f"{found.rounds:,}"],
        ["images", f"{found.images:,}"],
        ["bad requests, each refused with its own error", f"{sum(found.refused.values()):,}"],
        ["kinds of bad requests", str(len(found.refused))],
        ["full disks, no half-written file", str(found.full_disks)],
        ["processes killed and replaced", str(found.kills)],
        ["reference images with the same bits", "all" if found.same_image else "not all"],
    ]
    rows += [
        ["resident memory at the end, MiB", f"{found.rss_mib[-1]:.0f}"],
        ["resident memory, MiB an hour (95%)", _growth(found.rss_mib_per_hour, "+.1f")],
        ["memory given out by the C library, MiB", f"{found.allocated_mib[-1]:.0f}"],
        ["the same, MiB an hour (95%)", _growth(found.allocated_mib_per_hour, "+.1f")],
        ["Python's objects, millions", f"{found.python_blocks[-1] / 1e6:.2f}"],
        ["the same, an hour (95%)", _growth(found.python_blocks_per_hour, "+,.0f")],
        ["latency, last third over first (95%)", _growth(found.latency_drift, ".3f")],
    ]
    command = f"hcma-fast bench soak --minutes {found.minutes:g}"
    extent = f"`{found.model}` on {found.backend}"
    return _source(command, extent, found.machine) + _lines(["", ""], rows)


def _growth(found: Estimate | None, form: str) -> str:
    if found is None or found.interval is None:
        return ""
    low, high = found.interval
    return f"{found.value:{form}} ({low:{form}} to {high:{form}})"


def _machine(folder: Path) -> list[str]:
    """The machines of all results; one line each."""
    machines = [
        report.machine
        for path in sorted(folder.glob("*.json"))
        if path.stem != SOAK
        for report in read_results(path).reports
    ]
    lines = []
    for one in machines:
        versions = ", ".join(
            f"{name} {version}" for name, version in one.versions.items() if version
        )
        gpu = f"{one.gpu}, driver {one.driver}; " if one.gpu else ""
        lines.append(
            f"{one.cpu}, {one.cores} cores, {one.memory_gib:g} GiB; {gpu}Python {one.python}, "
            f"{versions}."
        )
    return list(dict.fromkeys(lines))


#: by the name in the marker
TABLES: dict[str, Callable[[Path], list[str]]] = {
    "machine": _machine,
    "goals": _goals,
    "peers-1": partial(_peers, group="aligned, batch 1"),
    "peers-8": partial(_peers, group="aligned, batch 8"),
    "peers-unaligned": partial(_peers, group="without alignment"),
    "latency": _latency,
    "ladder": _ladder,
    "throughput": _throughput,
    "scaling": _scaling,
    "unet": _unet,
    "align": _align,
    "build": _build,
    "train": partial(_train, file="train"),
    "train-sd14": partial(_train, file="train-sd14"),
    "overhead": _overhead,
    SOAK: _soak,
}


def with_tables(page: str, results: Path) -> str:
    """The page with its tables made anew from the folder of results.

    Raises:
        InputError: a marker names no table, or the results lack what a table needs.
    """

    def table(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in TABLES:
            raise InputError("no such table", value=name, remedy=f"Tables: {', '.join(TABLES)}.")
        return "\n".join([begin, *TABLES[name](results), "", end])

    return _BLOCK.sub(table, page)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables into the page."""
    parser = argparse.ArgumentParser(
        prog="python -m hcma_fast.bench.speed.tables",
        description="Write the tables of a page from the results of hcma-fast bench.",
    )
    parser.add_argument("results", type=Path, help="folder of the JSON files")
    parser.add_argument("page", type=Path, help="Markdown file with markers, rewritten in place")
    args = parser.parse_args(arguments)
    page = with_tables(read_text(args.page, "the page"), args.results)
    write_whole(args.page, lambda file: file.write(page.encode()))


if __name__ == "__main__":
    sys.exit(run_program(main))
