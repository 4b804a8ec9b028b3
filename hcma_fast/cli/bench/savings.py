"""``hcma-fast bench savings``: what the approximate savings gain and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hcma_fast.cli.options import (
    DEFAULT_STEPS,
    AsTable,
    Backend,
    BatchSize,
    FirstSeed,
    Model,
    Steps,
)
from hcma_fast.cli.output import BuildProgress, counting_bar, print_json
from hcma_fast.sampling.savings import Savings, parse_savings

if TYPE_CHECKING:
    from hcma_fast.bench.shared.bootstrap import Estimate
    from hcma_fast.bench.speed.savings import SavingsReport


def savings(
    model: Model = "tiny",
    backend: Backend = "onnxruntime",
    saving: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A row, such as guidance_end=0.8, with commas for more than one saving in it; "
            "repeat it for more rows.",
            show_default="five rows",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Layouts, an image each and row.")] = 300,
    seed: FirstSeed = 0,
    steps: Steps = DEFAULT_STEPS,
    batch_size: BatchSize = 10,
    json_: AsTable = False,
) -> None:
    """Draw the same images without and with each approximate saving, in turns.

    The judge scores them where the model draws EmojiScenes.
    """
    from hcma_fast.bench.quality.metrics.judge.model import Judge
    from hcma_fast.bench.speed.savings import SAVINGS, measure_savings
    from hcma_fast.runtime.pipeline import HCMAPipeline

    rows = [parse_savings(text.split(",")) for text in saving or ()] or SAVINGS
    with BuildProgress("Building engines, once for this model.") as building:
        pipe = HCMAPipeline.from_pretrained(model, backend=backend, progress=building)
    with counting_bar() as progress:
        task = progress.add_task("images", total=count)
        report = measure_savings(
            pipe,
            rows,
            count=count,
            seed=seed,
            batch_size=batch_size,
            num_inference_steps=steps,
            judge=Judge.load() if pipe.preset == "tiny" else None,
            progress=lambda done, _: progress.update(task, completed=done),
        )
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(savings_table(report))


def savings_table(report: SavingsReport) -> str:
    """The report in Markdown."""
    lines = [
        f"{report.preset} on {report.backend}, {report.count} test layouts of EmojiScenes, "
        f"{report.num_inference_steps} steps, {report.batch_size} images at once",
        "",
        "| saving | speed-up | p10 to p90 | latents' distance | p90 | boxes recognised "
        "| difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        low, high = row.speedup_interval
        difference = "" if row.difference is None else f"{row.difference.difference:+.1%}"
        if row.difference is not None:
            difference += " ({:+.1%} to {:+.1%})".format(*row.difference.interval)
        lines.append(
            f"| {_named(row.savings)} | {row.speedup:.2f} | {low:.2f} to {high:.2f} "
            f"| {row.distance:.1e} | {row.distance_p90:.1e} | {_shown(row.judge)} | {difference} |"
        )
    lines += [
        "",
        "Distance: relative, median and 90th percentile over the images. Boxes: those of sides of "
        "at least a quarter of the image, 95% intervals over images; the difference is paired.",
        f"{report.machine.line()}; weights {report.weights_hash[:16]}.",
    ]
    return "\n".join(lines)


def _named(savings: Savings) -> str:
    given = savings.model_dump(exclude_defaults=True)
    return ", ".join(f"`{name}={value}`" for name, value in given.items()) or "none"


def _shown(share: Estimate | None) -> str:
    if share is None or share.interval is None:
        return "not judged"
    low, high = share.interval
    return f"{share.value:.1%} ({low:.1%} to {high:.1%})"
