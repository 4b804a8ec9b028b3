"""``hcma-fast bench run``, ``compare`` and ``soak``: the suites of the speed harness."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcma_fast.cli.options import AsTable, AsTables, AsText, BatchSize
from hcma_fast.cli.output import output_folder, print_json, print_note
from hcma_fast.errors import HcmaError, InputError, OutputError, UsageError
from hcma_fast.files import read_json, write_file

if TYPE_CHECKING:
    from hcma_fast.bench.shared.bootstrap import Estimate
    from hcma_fast.bench.soak.report import SoakReport
    from hcma_fast.bench.speed.harness.plan import Plan
    from hcma_fast.bench.speed.harness.report import Report

RESULTS_FILE = "bench.json"
_RESULTS_BYTES = 2**28


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
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on after the last finished round in --out."),
    ] = False,
    json_: AsTables = False,
    csv: Annotated[bool, typer.Option("--csv", help="CSV instead of tables.")] = False,
) -> None:
    """Run suites: cases side by side and in turns, each in a process of its own.

    A row whose result does not agree with the plain loop's is void. Ends with an error if any row
    is void, or could not run. With --out, rows are written after each round.
    """
    from hcma_fast.bench.shared.plots import check_installed
    from hcma_fast.bench.speed.harness.plan import Plan
    from hcma_fast.bench.speed.harness.report import Results, report_markdown, rows_csv
    from hcma_fast.bench.speed.suites.table import ON_GPU, SUITES, check_suites, run_suite

    if json_ and csv:
        raise UsageError("--json and --csv exclude each other", remedy="Use one of them.")
    if resume and out is None:
        raise UsageError("--resume needs the rounds in --out", remedy="Add --out FOLDER.")
    plan = Plan(model, device, tuple(backend or ()), rounds, quick)
    every = [name for name in SUITES if plan.on_gpu or name not in ON_GPU]
    names = every if suites == ["all"] else suites
    check_suites(names, plan)
    _tell_if_busy()
    reports: list[Report] = []

    def results(more: Sequence[Report] = ()) -> Results:
        command = shlex.join(["hcma-fast", *sys.argv[1:]])
        return Results(command=command, reports=(*reports, *more))

    def write(folder: Path, more: Sequence[Report] = ()) -> None:
        write_file(folder / RESULTS_FILE, results(more).model_dump_json(indent=2).encode())

    def measure(folder: Path | None) -> None:
        if folder is not None and resume:
            reports.extend(_finished(folder, names, plan))
        for name in names[len(reports) :]:
            print_note(f"suite {name}")
            if folder is None:
                reports.append(run_suite(name, plan, print_note))
                continue
            rounds_file = folder / f"{name}.rounds.jsonl"

            def keep(report: Report, folder: Path = folder) -> None:
                write(folder, [report])

            reports.append(
                run_suite(
                    name,
                    plan,
                    print_note,
                    rounds_file=rounds_file,
                    resume=resume,
                    keep=keep,
                )
            )
            # first what --resume goes by
            write(folder)
            _write(folder, reports[-1])

    if out is None:
        measure(None)
    else:
        check_installed()
        _check_place(out, names)
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


def _check_place(folder: Path, names: Sequence[str]) -> None:
    """Refuse to replace files of our names in a folder that no run of suites has written."""
    ours = [RESULTS_FILE, "ladder.png", "scaling.png"]
    ours += [f"{name}.{suffix}" for name in names for suffix in ("md", "csv")]
    taken = [folder / name for name in ours if os.path.lexists(folder / name)]
    try:
        values = read_json(folder / RESULTS_FILE, "the results", limit=_RESULTS_BYTES)
    except InputError:
        values = None
    if taken and not (isinstance(values, dict) and {"command", "reports"} <= values.keys()):
        raise OutputError(
            f"this file is not of hcma-fast bench run, whose {RESULTS_FILE} is not beside it, and "
            "is not replaced",
            value=str(taken[0]),
            remedy="Give another --out, or move the file away.",
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


def _finished(folder: Path, names: Sequence[str], plan: Plan) -> list[Report]:
    """The first suites of an interrupted run, as far as they are finished.

    Raises:
        InputError: the results there are of other suites.
    """
    from hcma_fast.bench.speed.harness.report import read_results

    if not (folder / RESULTS_FILE).is_file():
        return []
    there = [report for report in read_results(folder / RESULTS_FILE).reports if report.finished]
    found = [report.suite for report in there]
    wanted = (plan.model, plan.device, plan.quick)
    same = all((report.model, report.device, report.quick) == wanted for report in there)
    if found != list(names[: len(found)]) or not same:
        raise InputError(
            "the results here are of other suites, or of another model, device or size",
            value=", ".join(found),
            remedy="Give the options of the run that was interrupted, or another --out.",
        )
    return there


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
    json_: AsTable = False,
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
    max_batch: BatchSize = 4,
    out: Annotated[Path | None, typer.Option(help="JSON file for the report.")] = None,
    json_: AsText = False,
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
