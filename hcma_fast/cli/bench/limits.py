"""``hcma-fast bench roofline``: what is left if all else were perfect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hcma_fast.cli.options import DEFAULT_STEPS, AsTables, Steps, precision_option
from hcma_fast.cli.output import print_json, print_note
from hcma_fast.config import MAX_OBJECTS

if TYPE_CHECKING:
    from hcma_fast.bench.estimates.gpus import GPU
    from hcma_fast.bench.estimates.roofline import RooflineReport
    from hcma_fast.bench.estimates.times import BatchTime


def roofline(
    gpu: Annotated[
        str,
        typer.Option(
            help="Cards, with commas: h100, h200, b200, a100, l40s, rtx5090, rtx4090, t4."
        ),
    ] = "h100,h200,b200,a100,l40s,rtx5090,rtx4090,t4",
    model: Annotated[
        str,
        typer.Option(help="sd14 (no weights needed), tiny, a folder or engine folder."),
    ] = "sd14",
    batch: Annotated[str, typer.Option(help="Images at once, with commas.")] = "1,4,16",
    precision: Annotated[
        str | None,
        precision_option("float16, or the engine folder's"),
    ] = None,
    steps: Steps = DEFAULT_STEPS,
    boxes: Annotated[
        int, typer.Option(min=0, max=MAX_OBJECTS, help="Boxes per image, a phrase each.")
    ] = 2,
    json_: AsTables = False,
) -> None:
    """Estimate the least time on a GPU, by counted operations and bytes and published peak rates.

    Nothing is run and no GPU is needed.
    """
    from hcma_fast.bench.estimates.roofline import parse_batches, parse_gpus
    from hcma_fast.bench.estimates.roofline import roofline as estimate

    report = estimate(
        model,
        gpus=parse_gpus(gpu),
        batches=parse_batches(batch),
        precision=precision,
        num_inference_steps=steps,
        boxes=boxes,
        progress=print_note,
    )
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(roofline_tables(report))


def roofline_tables(report: RooflineReport) -> str:
    """The report in Markdown: what was counted, then a table for each card."""
    guidance = "with" if report.guided else "without"
    lines = [
        f"Estimate, by counts and published peak rates; nothing was run. {report.preset}, "
        f"{report.height} x {report.width} pixels, {report.precision}, "
        f"{report.num_inference_steps} steps {guidance} guidance, {report.boxes} boxes per image; "
        f"counted from {report.counted}.",
        "",
        "| one call of | images | calls | GFLOP | padding, GFLOP | exponentials, M "
        "| normalised, M | weights, MB | inputs and outputs, MB | unfused, MB | FLOP per byte |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for images, counts in report.counts.items():
        for row in counts:
            least = row.weights_bytes + row.io_bytes
            lines.append(
                f"| {_label(row.graph, row.batch, images)} | {images} | {row.times} "
                f"| {row.flops / 1e9:.2f} | {row.padding_flops / 1e9:.2f} "
                f"| {row.exponentials / 1e6:.1f} | {row.normalised / 1e6:.1f} "
                f"| {row.weights_bytes / 1e6:.1f} "
                f"| {row.io_bytes / 1e6:.2f} | {row.unfused_bytes / 1e6:.0f} "
                f"| {row.flops / least:.0f} |"
            )
    for name, gpu in report.gpus.items():
        lines += ["", *_card_table(report, gpu, [row for row in report.rows if row.gpu == name])]
    lines += [
        "",
        "Weights, inputs and outputs pass through the memory once, activations not at all: that is "
        "the floor, and what bounds it. The practical floor has a kernel for each product and "
        "norm, with attention's padding and exponentials. In brackets: the practical floor, then "
        "every operator by itself.",
        f"{report.command}; counted on {report.machine.line()}.",
    ]
    return "\n".join(lines)


def _card_table(report: RooflineReport, gpu: GPU, rows: list[BatchTime]) -> list[str]:
    lines = [
        f"Estimate for {gpu.name} ({gpu.half_flops / 1e12:g} TFLOP/s in half precision, "
        f"{gpu.float32_flops / 1e12:g} in float32, {gpu.bandwidth / 1e9:g} GB/s): ms at least "
        "(practical; unfused)",
        "",
        f"| | {' | '.join(f'batch {row.batch}' for row in rows)} |",
        "|---|" + "---|" * len(rows),
    ]

    def add(label: str, cells: list[str]) -> None:
        lines.append(f"| {label} | {' | '.join(cells)} |")

    for same in zip(*(row.calls for row in rows), strict=True):
        add(
            same[0].graph,
            [f"{_three(c.floor_s, c.practical_s, c.unfused_s)} {c.bound}" for c in same],
        )
    add(
        "a step: align and UNet",
        [_three(row.step_floor_s, row.step_practical_s, row.step_unfused_s) for row in rows],
    )
    add(
        f"alignment's share of it; the goal is {report.align_share_goal:.0%}",
        [f"{row.align_share:.1%} ({row.align_share_unfused:.1%} unfused)" for row in rows],
    )
    add(
        "an image",
        [_three(row.image_floor_s, row.image_practical_s, row.image_unfused_s) for row in rows],
    )
    add(
        "images per second, at most",
        [
            f"{_short(1 / row.image_floor_s)} ({_short(1 / row.image_practical_s)}; "
            f"{_short(1 / row.image_unfused_s)})"
            for row in rows
        ],
    )
    for peer in (peer for peer in report.peers if peer.gpu == rows[0].gpu):
        add(
            f"published, plain SD 1.5 by {peer.name}: {peer.evaluations_per_s:g} evaluations per "
            f"second, {peer.share_of_peak:.0%} of the peak; our UNet at that share",
            [_ms(peer.ours_at_that_share_s)] + [""] * (len(rows) - 1),
        )
    return lines


def _label(graph: str, batch: int, images: int) -> str:
    """The graph, and what it gets for an image if that is not one."""
    return graph if batch == images else f"{graph}, {batch / images:g} per image"


def _three(floor: float, practical: float, unfused: float) -> str:
    return f"{_ms(floor)} ({_ms(practical)}; {_ms(unfused)})"


def _ms(seconds: float) -> str:
    return _short(seconds * 1e3)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
