"""An evaluation's report as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math

from hcma_fast.bench.quality.scores import EvalReport, MethodScores
from hcma_fast.bench.shared.bootstrap import Estimate

_COSTS = ("s per image", "UNet forward", "UNet backward", "aligner passes", "peak MiB")


def score_names(report: EvalReport) -> list[str]:
    """All scores that any method has, in the order of the first that has them."""
    names: dict[str, None] = {}
    for row in report.methods:
        names.update(dict.fromkeys(row.scores))
    return list(names)


def markdown(report: EvalReport) -> str:
    """Scores, costs and comparisons as tables, with all it takes to make them again."""
    names = score_names(report)
    rows = [*report.methods, *([report.real] if report.real else [])]
    lines = [
        f"# {report.run.preset}: {report.run.count} layouts of {report.run.data}",
        "",
        *paragraphs(report),
        "",
        *_table(["score", *(row.method for row in rows)], score_rows(report, names, rows)),
        "",
        *_table(list(COST_HEAD), [cost_row(row) for row in report.methods]),
        "",
        *(line for text in notes(report) for line in (text, "")),
    ]
    if report.differences:
        lines += _table(list(DIFFERENCE_HEAD), difference_rows(report))
    return "\n".join([*lines, "", *(line for text in footer(report) for line in (text, ""))])


def paragraphs(report: EvalReport) -> list[str]:
    """What was measured, on what."""
    run = report.run
    return [
        f"{run.num_inference_steps} PLMS steps, {run.width} x {run.height} pixels, seed "
        f"{run.seed} + index, the same for every method; backend {run.backend} on {run.device}. "
        f"Real images: {report.real_images}. Values with their 95% bootstrap interval over images."
    ]


def notes(report: EvalReport) -> list[str]:
    """What a reader must know to read the tables right."""
    found = [
        "Passes are those beyond the sampler's own, per image. Guidance by attention runs in torch "
        f"eager whatever the backend; everything else runs on {report.run.backend}."
    ]
    if any(row.cost and not row.cost.own_process for row in report.methods):
        found.append(
            "Peak memory is the process's: methods that share one show that of the largest before "
            "them. Run hcma-fast eval once per method for figures of their own."
        )
    if "EmojiScenes" in report.titles.get("features", ""):
        found.append(
            "EmojiScenes, judge features: Frechet distance and KID are on the judge's features, "
            "and cannot be compared with FID on Inception's. The attention peers' constants were "
            "chosen by their authors for Stable Diffusion, and are used unchanged. sd and these "
            "peers draw by the caption alone, without gated layers. A UNet that was trained with "
            "boxes from the start, as that of tiny, does so badly: their rows say little of the "
            "methods themselves."
        )
    return found


def score_rows(report: EvalReport, names: list[str], rows: list[MethodScores]) -> list[list[str]]:
    """A row per score, a column per method."""
    return [[name, *(shown(row.scores.get(name)) for row in rows)] for name in names]


def cost_row(row: MethodScores) -> list[str]:
    """The cost columns of one method."""
    cost = row.cost
    if cost is None:
        return [row.method, *[""] * len(_COSTS)]
    return [
        row.method,
        shown(cost.seconds),
        f"{cost.unet_forward:.1f}",
        f"{cost.unet_backward:.1f}",
        f"{cost.aligner_passes:.0f}",
        f"{cost.peak_memory_mib:.0f}",
    ]


COST_HEAD = ("method", *_COSTS)
DIFFERENCE_HEAD = ("comparison", "difference", "95% interval", "p")


def difference_rows(report: EvalReport) -> list[list[str]]:
    """The paired comparisons."""
    return [
        [
            item.metric,
            number(item.difference),
            f"{number(item.interval[0])} to {number(item.interval[1])}",
            f"{item.p_value:.3f}",
        ]
        for item in report.differences
    ]


def footer(report: EvalReport) -> list[str]:
    """Networks, machine, versions, hashes and the command."""
    titles = "; ".join(f"{name}: {title}" for name, title in sorted(report.titles.items()))
    return [
        f"Networks: {titles or 'none'}. Weights {report.run.weights_hash[:16]}, layouts "
        f"{report.run.items_hash[:16]}.",
        f"{report.machine.line()}.",
        f"Command: `{report.command}`",
    ]


def shown(value: Estimate | None) -> str:
    """A score with its interval."""
    if value is None or not math.isfinite(value.value):
        return "none"
    if value.interval is None:
        return number(value.value)
    low, high = value.interval
    return f"{number(value.value)} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Three decimals, or significant digits of small and large ones."""
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def as_csv(report: EvalReport) -> str:
    """One line per method and score, costs included."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "score", "value", "low", "high"])
    for row in [*report.methods, *([report.real] if report.real else [])]:
        for name, found in row.scores.items():
            writer.writerow([row.method, name, *_numbers(found)])
        if row.cost is not None:
            writer.writerow([row.method, "seconds per image", *_numbers(row.cost.seconds)])
            for name in ("unet_forward", "unet_backward", "aligner_passes", "peak_memory_mib"):
                writer.writerow([row.method, name, getattr(row.cost, name), "", ""])
    return buffer.getvalue()


def _numbers(value: Estimate) -> tuple[float, float | str, float | str]:
    low, high = value.interval or ("", "")
    return value.value, low, high


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
