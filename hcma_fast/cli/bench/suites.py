"""``hcma-fast bench run``, ``compare`` and ``soak``: the suites of the speed harness."""

from __future__ import annotations

import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcma_fast.cli.output import output_folder, print_json, print_note, write_file
from hcma_fast.errors import HcmaError, UsageError

if TYPE_CHECKING:
    from hcma_fast.bench.shared.bootstrap import Estimate
    from hcma_fast.bench.soak.report import SoakReport
    from hcma_fast.bench.speed.harness.report import Report

RESULTS_FILE = "bench.json"


def run(
    suites: Annotated[
        list[str],
        typer.Argument(
            metavar="SUITE",
            help="latency, throughput, peers, ladder, scaling, align, unet, build, train, "
            "overhead, kernels (on a GPU), or all.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(help="tiny, sd14 (random weights, one evaluation), or a folder."),
    ] = "tiny",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PRECISION]",
            help="Of our pipeline, such as openvino:bfloat16; repeat it.",
            show_default="those that are here",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Timed runs of each.", show_default="the suite's own"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, one round: whether it works.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help=f"Folder for {RESULTS_FILE}, and per suite a table, CSV and plot."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of tables.")] = False,
) -> None:
    """Run suites: cases side by side and in turns, each in a process of its own.

    A row whose result does not agree with the plain loop's is void. Ends with an error if any row
    is void, or could not run.
    """
    from hcma_fast.bench.shared.plots import check_installed
    from hcma_fast.bench.speed.harness.plan import Plan
    from hcma_fast.bench.speed.harness.report import Results, report_markdown, rows_csv
    from hcma_fast.bench.speed.suites.table import ON_GPU, SUITES, check_suites, run_suite

    if json_ and csv:
        raise UsageError("--json and --csv exclude each other", remedy="Use one of them.")
    plan = Plan(model, device, tuple(backend or ()), rounds, quick)
    every = [name for name in SUITES if plan.on_gpu or name not in ON_GPU]
    names = every if suites == ["all"] else suites
    check_suites(names, plan)
    _tell_if_busy()
    reports: list[Report] = []

    def results() -> Results:
        return Results(command=shlex.join(["hcma-fast", *sys.argv[1:]]), reports=tuple(reports))

    def measure(folder: Path | None) -> None:
        for name in names:
            print_note(f"suite {name}")
            reports.append(run_suite(name, plan, print_note))
            if folder is not None:
                _write(folder, reports[-1])
                # after each suite: what was measured is not lost with a later one
                write_file(folder / RESULTS_FILE, results().model_dump_json(indent=2).encode())

    if out is None:
        measure(None)
    else:
        check_installed()
        with output_folder(out) as folder:
            measure(folder)
    if json_:
        print_json(results().model_dump(mode="json"))
    elif csv:
        typer.echo(rows_csv(reports), nl=False)
    else:
        typer.echo("\n\n".join(report_markdown(report) for report in reports))
    wrong = [f"{report.suite}, {row}" for report in reports for row in report.void]
    failed = [f"{report.suite}, {name}" for report in reports for name in report.failed]
    if wrong or failed:
        raise HcmaError(
            f"{len(wrong)} rows are void and {len(failed)} could not run",
            value="; ".join(wrong + failed),
            remedy="The tables say why; leave backends out by naming others with --backend.",
        )


def _write(folder: Path, report: Report) -> None:
    from hcma_fast.bench.speed.harness.report import report_markdown, rows_csv
    from hcma_fast.bench.speed.suites.ladder import ladder_png
    from hcma_fast.bench.speed.suites.scaling import scaling_png

    write_file(folder / f"{report.suite}.md", f"{report_markdown(report)}\n".encode())
    write_file(folder / f"{report.suite}.csv", rows_csv([report]).encode())
    if report.suite == "ladder" and report.rows:
        write_file(folder / "ladder.png", ladder_png(report.rows))
    if report.fits:
        write_file(folder / "scaling.png", scaling_png(report.fits))


def _tell_if_busy() -> None:
    """Beside other work a torch loop loses more time than engines do, and we would look better."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print_note(
            f"This machine is busy (load {load:.1f} on {cores} cores): timings will say little."
        )


def show(
    results: Annotated[Path, typer.Argument(help="JSON of bench run or bench soak.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="ROW",
            help="Compare the rows of each group with this one too.",
            show_default="the loop under torch.compile, where it is",
        ),
    ] = None,
) -> None:
    """Show the tables of finished results again; nothing is measured.

    Speed-ups against another row are ratios within a round, as those against the first one.
    """
    from hcma_fast.bench.soak.report import read_soak
    from hcma_fast.bench.speed.harness.report import COMPILED, read_results, report_markdown

    if (soaked := read_soak(results)) is not None:
        typer.echo(soak_text(soaked))
        return
    reports = read_results(results).reports
    names = list(dict.fromkeys(row.name for report in reports for row in report.rows))
    if against is not None and against not in names:
        raise UsageError("no such row", value=against, remedy=f"Rows: {'; '.join(names)}.")
    typer.echo("\n\n".join(report_markdown(report, against or COMPILED) for report in reports))


def compare(
    old: Annotated[Path, typer.Argument(help="JSON of bench run.")],
    new: Annotated[Path, typer.Argument(help="JSON of bench run.")],
    threshold: Annotated[
        float, typer.Option(help="Ratio of the medians, new over old, that is too slow.")
    ] = 1.1,
    json_: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Compare two results row by row, with intervals; ends with an error if a row became slower.

    Slower is: above the threshold, and not by chance (the 95% interval is above 1). A row that is
    missing in the new results, while its suite is there, is an error too.
    """
    from hcma_fast.bench.speed.harness.compare import compare_results, comparison_markdown
    from hcma_fast.bench.speed.harness.report import read_results

    found = compare_results(read_results(old), read_results(new), threshold)
    if json_:
        print_json(found.model_dump(mode="json"))
    else:
        typer.echo(comparison_markdown(found))
    if found.failures:
        raise HcmaError(
            f"{len(found.failures)} rows became slower than {threshold:g} times, or void, or are "
            "missing",
            value="; ".join(found.failures),
            remedy="If the machine was busy, measure both again in one go, with the same backends.",
        )


def soak(
    minutes: Annotated[float, typer.Option(help="How long.")] = 20,
    model: Annotated[str, typer.Option(help="Preset or folder.")] = "tiny",
    backend: Annotated[str, typer.Option(help="What generates.")] = "onnxruntime",
    max_batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 4,
    out: Annotated[Path | None, typer.Option(help="JSON file for the report.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Mixed requests for a long time, with bad ones, a full disk and a killed process among them.

    Ends with an error if memory grows, latency drifts, or an image changes. Too short a soak says
    that memory and latency were not judged, or not shown to stay.
    """
    from hcma_fast.bench.soak.soak import soak as run_soak

    report = run_soak(
        model, backend=backend, minutes=minutes, max_batch=max_batch, progress=print_note
    )
    if out is not None:
        write_file(out, report.model_dump_json(indent=2).encode())
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(soak_text(report))
    if report.not_judged is not None:
        print_note(report.not_judged)
    if report.problems:
        raise HcmaError(
            "it did not stay as it was", value="; ".join(report.problems), remedy="Report it."
        )


def _with_interval(found: Estimate, form: str, unit: str = "") -> str:
    low, high = found.interval or (found.value,) * 2
    return f"{found.value:{form}}{unit} (about 95%: {low:{form}} to {high:{form}})"


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def soak_text(report: SoakReport) -> str:
    """The report in Markdown."""
    slope, drift = report.rss_mib_per_hour, report.latency_drift
    lines = [
        f"Soak of {report.model} on {report.backend}, {report.minutes:g} min: {report.rounds} "
        f"rounds, {report.images} mixed images.",
        f"Faults: {_counted(sum(report.refused.values()), 'bad request')} refused, of "
        f"{_counted(len(report.refused), 'kind')}; {_counted(report.full_disks, 'full disk')}; "
        f"{_counted(report.kills, 'process', 'processes')} killed and replaced.",
        f"Reference images {'the same' if report.same_image else 'NOT the same'} in all rounds and "
        f"both processes (sha256 {report.image_sha256[:16]}).",
    ]
    if slope is None or drift is None:
        lines.append(f"{report.not_judged}.")
    else:
        per_hour = partial(_with_interval, form="+.2f", unit=" MiB an hour")
        lines.append(
            f"Resident memory: {report.rss_mib[-1]:.0f} MiB at the end, {per_hour(slope)}."
        )
        if report.allocated_mib_per_hour is not None:
            lines.append(
                f"Allocated, as the C library counts: {report.allocated_mib[-1]:.0f} MiB, "
                f"{per_hour(report.allocated_mib_per_hour)}."
            )
        if report.python_blocks_per_hour is not None:
            lines.append(
                f"Python's objects: {report.python_blocks[-1]:,} blocks, "
                f"{_with_interval(report.python_blocks_per_hour, '+,.0f', ' an hour')}."
            )
        lines.append(
            "Latency, median of the last third of rounds over that of the first: "
            f"{_with_interval(drift, '.3f')}."
        )
    lines += [f"Not shown to stay: {what}; soak for longer." for what in report.not_shown]
    return "\n".join([*lines, f"{report.machine.line()}."])
