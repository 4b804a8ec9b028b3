"""``hcma-fast bench``: speed against a plain diffusers loop, and quality as the judge sees it."""

from __future__ import annotations

from contextlib import redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TaskID

from hcma_fast.cli.bench.limits import roofline
from hcma_fast.cli.bench.savings import savings
from hcma_fast.cli.bench.suites import compare, run, show, soak
from hcma_fast.cli.options import (
    DEFAULT_STEPS,
    AsMarkdown,
    AsTable,
    Backend,
    BatchSize,
    FirstSeed,
    Model,
    Steps,
)
from hcma_fast.cli.output import (
    BuildProgress,
    counting_bar,
    print_json,
    print_note,
    stderr,
)
from hcma_fast.cli.verbs import PLAIN_HELP
from hcma_fast.config import PRESETS
from hcma_fast.errors import HcmaError, UsageError
from hcma_fast.files import write_file

if TYPE_CHECKING:
    from hcma_fast.bench.quality.evaluate import QualityReport, Share

bench_app = typer.Typer(
    help="Measure speed and quality. Tables and JSON on stdout, progress on stderr.",
    no_args_is_help=True,
    rich_markup_mode=PLAIN_HELP,
)
bench_app.command(short_help="Estimate the least time on a GPU, by peak rates.")(roofline)
bench_app.command(short_help="Run suites of cases side by side, each in its own process.")(run)
bench_app.command(short_help="Show the tables of finished results of run again.")(show)
bench_app.command(short_help="Compare two results of run, row by row.")(compare)
bench_app.command(short_help="Mixed requests for a long time, with faults among them.")(soak)
bench_app.command(short_help="Measure what each approximate saving gains and costs.")(savings)
_BUILDING = "Building engines, once for this model; the next run finds them in the cache."


@bench_app.command(short_help="Time a plain diffusers loop and the pipeline in turns.")
def speed(
    model: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}, or a folder.")] = "tiny",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="What to compare; repeat it.", show_default="eager, onnxruntime"
        ),
    ] = None,
    steps: Steps = DEFAULT_STEPS,
    batch: BatchSize = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory: Annotated[bool, typer.Option(help="Also measure generate's peak memory.")] = True,
    json_: AsTable = False,
) -> None:
    """Time a plain diffusers loop and the pipeline in turns, on the same weights and seed.

    Each has a process of its own, as it would have at a user's. `bench run` has larger suites.
    """
    from hcma_fast.bench.speed.harness.report import report_markdown
    from hcma_fast.bench.speed.plain_and_ours import measure_speed

    report = measure_speed(
        model,
        backends=backend or ("eager", "onnxruntime"),
        num_inference_steps=steps,
        batch=batch,
        rounds=rounds,
        device=device,
        memory=memory,
        progress=print_note,
    )
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(report_markdown(report))
    if report.void:
        raise HcmaError(
            "final latents do not agree with the plain loop's, so these timings are void",
            value=", ".join(report.void),
            remedy="Report it with the output of hcma-fast doctor.",
        )


@bench_app.command(short_help="Count the boxes in which the judge sees what was asked for.")
def quality(
    model: Model = "tiny",
    backend: Backend = "onnxruntime",
    count: Annotated[int, typer.Option(min=1, help="Layouts, an image each.")] = 300,
    split: Annotated[str, typer.Option(help="Split of EmojiScenes: test or val.")] = "test",
    seed: FirstSeed = 0,
    steps: Steps = DEFAULT_STEPS,
    batch_size: BatchSize = 10,
    min_side: Annotated[
        float, typer.Option(min=0, max=1, help="Smallest side of a large box, of the image's.")
    ] = 0.25,
    eta0: Annotated[
        list[float] | None,
        typer.Option(
            metavar="RATE",
            help="Rate of the alignment, 0 for off; repeat it to compare.",
            show_default="the model's own",
        ),
    ] = None,
    guidance_scale: Annotated[
        list[float] | None,
        typer.Option(
            metavar="WEIGHT",
            help="Weight of the guidance; repeat it to compare.",
            show_default="the model's own",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Where finished images are kept, to go on after a stop.",
            show_default="the user's cache",
        ),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="PNG for a contact sheet; one per setting.")
    ] = None,
    json_: AsTable = False,
) -> None:
    """Generate a split's layouts and count the boxes in which the judge sees what was asked for."""
    from hcma_fast.bench.quality.evaluate import evaluate
    from hcma_fast.bench.quality.metrics.judge.model import Judge
    from hcma_fast.config import cache_root
    from hcma_fast.runtime.pipeline import HCMAPipeline

    if split not in ("test", "val"):
        raise UsageError("quality is measured on held-out scenes", value=split, remedy="Use test.")
    judge = Judge.load()
    with BuildProgress(_BUILDING) as building:
        pipe = HCMAPipeline.from_pretrained(model, backend=backend, progress=building)
    reports: list[QualityReport] = []
    rates: list[float | None] = [*eta0] if eta0 else [None]
    scales: list[float | None] = [*guidance_scale] if guidance_scale else [None]
    settings = list(product(rates, scales))
    with counting_bar() as progress:
        for number, (rate, guidance) in enumerate(settings, 1):
            task = progress.add_task(f"images {number}/{len(settings)}", total=count)
            reports.append(
                evaluate(
                    pipe,
                    count=count,
                    split="test" if split == "test" else "val",
                    seed=seed,
                    batch_size=batch_size,
                    min_side=min_side,
                    eta0=rate,
                    guidance_scale=guidance,
                    num_inference_steps=steps,
                    work=work or cache_root() / "quality",
                    judge=judge,
                    grid=_numbered(grid, number, len(settings)),
                    progress=partial(_advance, progress, task),
                )
            )
    if json_:
        print_json([report.model_dump(mode="json") for report in reports])
    else:
        typer.echo(quality_table(reports))


def _advance(progress: Progress, task: TaskID, done: int, count: int) -> None:
    progress.update(task, completed=done, total=count)


def _numbered(path: Path | None, number: int, count: int) -> Path | None:
    if path is None or count == 1:
        return path
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def quality_table(reports: list[QualityReport]) -> str:
    """The reports in Markdown, a row per setting; then the first one's categories."""
    first = reports[0]
    lines = [
        f"{first.preset} on {first.backend}, {first.count} {first.split} layouts, "
        f"{first.num_inference_steps} steps, seeds from {first.seed}; boxes that the judge "
        "recognises (95% interval over images)",
        "",
        f"| eta0 | guidance | boxes of sides >= {first.min_side:g} | all boxes | unseen pairs "
        f"| recognised by likeness, sides >= {first.min_side:g} | recognised by likeness |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        likeness = (report.likeness.large_boxes, report.likeness.all_boxes)
        shares = (report.large_boxes, report.all_boxes, report.held_out_pairs, *likeness)
        cells = [f"{report.settings.eta0:g}", f"{report.settings.guidance_scale:g}"]
        lines.append(f"| {' | '.join(cells + [_shown(share) for share in shares])} |")
    ceiling = (first.ceiling_large_boxes, first.ceiling_all_boxes)
    alike = (first.likeness.ceiling_large_boxes, first.likeness.ceiling_all_boxes)
    lines += [
        f"| real renders | | {' | '.join(_shown(share) for share in ceiling)} | "
        f"| {' | '.join(_shown(share) for share in alike)} |",
        "",
        "By category, first row: "
        + ", ".join(
            f"{name} {share.correct}/{share.total}"
            for name, share in first.per_category.items()
            if share.total
        ),
        "Recognised by likeness: "
        + ", ".join(
            f"{name} {share.correct}/{share.total}"
            for name, share in first.likeness.per_category.items()
            if share.total
        ),
        "Most often mistaken: "
        + (", ".join(f"{a} for {b} ({n})" for a, b, n in first.mistaken_for[:8]) or "none"),
        f"Weights {first.weights_hash[:16]}, judge {first.judge_sha256[:16]}, "
        f"likeness judge {first.likeness.sha256[:16]}, {first.date}.",
    ]
    return "\n".join(lines)


def _shown(share: Share) -> str:
    if share.accuracy is None or share.interval is None:
        return "no such box"
    low, high = share.interval
    return f"{share.accuracy:.1%} ({low:.1%} to {high:.1%}) of {share.total}"


@bench_app.command(short_help="Show what the Triton kernels take, per GPU architecture.")
def kernels(
    offline: Annotated[
        bool, typer.Option("--offline", help="Compile and count; needs no GPU.")
    ] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the report as a page of Markdown.")
    ] = None,
    json_: AsMarkdown = False,
) -> None:
    """Registers, spills, shared memory and bytes of the Triton kernels, per GPU architecture."""
    from hcma_fast.bench.estimates.kernel_resources import kernels_markdown, offline_table

    if not offline:
        raise UsageError(
            "kernels are counted here, and timed by a suite",
            value="no --offline",
            remedy="Add --offline, or run hcma-fast bench run kernels --device cuda.",
        )
    with redirect_stdout(stderr.file):
        report = offline_table(progress=print_note)
    page = kernels_markdown(report)
    if markdown is not None:
        write_file(markdown, page.encode())
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(page)
