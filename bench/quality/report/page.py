"""An evaluation's report as one HTML page: tables, plots, and pictures side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from hcma_fast.bench.quality.generate import RunSettings, image_files
from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.methods.table import Method
from hcma_fast.bench.quality.report.tables import (
    COST_HEAD,
    DIFFERENCE_HEAD,
    cost_row,
    difference_rows,
    footer,
    notes,
    paragraphs,
    score_names,
    score_rows,
)
from hcma_fast.bench.quality.scores import LOWER_IS_BETTER, EvalReport
from hcma_fast.layout import Layout
from hcma_fast.train.data.image_files import open_image_file

_SHOWN_SIDE = 256
_COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
"""Okabe and Ito's, which colour-blind readers can tell apart"""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 96rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: .25rem .5rem; text-align: left; vertical-align: top }
.pictures td { border: 0; padding: .15rem; font-size: 12px; max-width: 12rem }
.pictures svg { width: 11rem; height: 11rem; image-rendering: pixelated }
figure { display: inline-block; margin: 0 1rem 1rem 0 }
"""


def page(
    report: EvalReport,
    methods: Sequence[Method],
    items: Sequence[EvalItem],
    out: Path,
    *,
    pictures: int,
    resize_real: bool,
) -> str:
    """The page, which needs no other file.

    Args:
        pictures: how many layouts to show, from the first.

    Raises:
        InputError: a real image cannot be read.
    """
    rows = [*report.methods, *([report.real] if report.real else [])]
    title = f"{report.run.preset}: {report.run.count} layouts of {report.run.data}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>",
        *(f"<p>{escape(text)}</p>" for text in paragraphs(report)),
        "<h2>Scores</h2>",
        _table(
            ["score", *(row.method for row in rows)],
            score_rows(report, score_names(report), rows),
        ),
        "<h2>Cost</h2>",
        _table(list(COST_HEAD), [cost_row(row) for row in report.methods]),
        *(f"<p>{escape(text)}</p>" for text in notes(report)),
    ]
    if report.differences:
        parts += [
            "<h2>Differences (paired bootstrap)</h2>",
            _table(list(DIFFERENCE_HEAD), difference_rows(report)),
        ]
    parts += ["<h2>Plots</h2>", *(_figure(figure) for figure in plots(report))]
    parts += [
        "<h2>Pictures</h2><p>The same layout and seed in each row; not selected.</p>",
        _grid(methods, items[:pictures], report.run, out, resize_real=resize_real),
        *(f"<p>{escape(text)}</p>" for text in footer(report)),
        "</html>",
    ]
    return "\n".join(parts)


def plots(report: EvalReport) -> list[Figure]:
    """Quality against time, loss against step, score against eta; those that have data."""
    figures = []
    names = score_names(report)
    if names:
        figure, name = Figure(figsize=(7, 4.5), layout="constrained"), names[0]
        axes = figure.add_subplot()
        for row, colour in zip(report.methods, _cycle(len(report.methods)), strict=True):
            if row.cost is None or name not in row.scores:
                continue
            y, x = row.scores[name], row.cost.seconds
            axes.errorbar(
                x.value,
                y.value,
                yerr=_bars(y.value, y.interval),
                xerr=_bars(x.value, x.interval),
                fmt="o",
                color=colour,
                label=row.method,
            )
        better = "lower" if any(word in name for word in LOWER_IS_BETTER) else "higher"
        axes.set(xlabel="seconds per image", ylabel=f"{name} ({better} is better)")
        axes.set_title("Quality against time")
        axes.legend(fontsize=8)
        figures.append(figure)
    curves = [row for row in report.methods if any(v is not None for v in row.losses)]
    if curves:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        # the colours of the first plot
        for row in curves:
            colour = _COLOURS[report.methods.index(row) % len(_COLOURS)]
            values = [float("nan") if value is None else value for value in row.losses]
            axes.plot(range(len(values)), values, ".-", color=colour, label=row.method)
        axes.set(xlabel="PLMS step", ylabel="mean loss, each method's own")
        axes.set_title("Loss against step")
        axes.legend(fontsize=8)
        figures.append(figure)
    rates = sorted(
        (
            row
            for row in report.methods
            if row.name in ("gligen", "hcma") and names and names[0] in row.scores
        ),
        key=lambda row: row.eta0,
    )
    if len({row.eta0 for row in rates}) > 1:
        figure, name = Figure(figsize=(7, 4.5), layout="constrained"), names[0]
        axes = figure.add_subplot()
        for row in rates:
            y = row.scores[name]
            axes.errorbar(
                row.eta0, y.value, yerr=_bars(y.value, y.interval), fmt="o-", color="#0072B2"
            )
        axes.plot([r.eta0 for r in rates], [r.scores[name].value for r in rates], color="#0072B2")
        axes.set(xlabel="eta0 (0: gligen)", ylabel=name)
        axes.set_title("Score against eta")
        figures.append(figure)
    return figures


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _bars(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    if interval is None:
        return None
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]]


def _figure(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = escape(figure.axes[0].get_title())
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}" for c in row) for row in rows)
    return f"<table><tr>{first}{body}</table>"


def _grid(
    methods: Sequence[Method],
    items: Sequence[EvalItem],
    run: RunSettings,
    out: Path,
    *,
    resize_real: bool,
) -> str:
    real = all(item.has_real for item in items)
    heads = ["", *(method.label for method in methods), *(["real"] if real else [])]
    rows = ["<tr>" + "".join(f"<th>{escape(name)}" for name in heads)]
    for item in items:
        cells = [f"<td>{escape(item.prompt)}<br>{escape(item.id)}"]
        for method in methods:
            path, _ = image_files(out, method, item)
            size = (run.width, run.height)
            opened = open_image_file(path, f"an image of {method.label}", size=size)
            cells.append(f"<td>{_picture(opened.image, item.layout)}")
        if real:
            picture = item.real_image(run.width, run.height, resize=resize_real)
            cells.append(f"<td>{_picture(picture, item.layout)}")
        rows.append("<tr>" + "".join(cells))
    return f'<table class="pictures">{"".join(rows)}</table>'


def _picture(image: Image.Image, layout: Layout) -> str:
    """The image with its boxes, as SVG around a PNG."""
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    shapes = [
        f'<image width="100" height="100" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
    ]
    colours = _cycle(len(layout))
    for phrase, box, colour in zip(layout.phrases, layout.boxes, colours, strict=True):
        x0, y0, x1, y1 = (100 * value for value in box)
        shapes.append(
            f'<rect x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}" '
            f'fill="none" stroke="{colour}"><title>{escape(phrase)}</title></rect>'
            f'<text x="{x0 + 1:.2f}" y="{y0 + 7:.2f}" font-size="7" fill="{colour}" '
            f'stroke="black" stroke-width=".2">{escape(phrase)}</text>'
        )
    return f'<svg viewBox="0 0 100 100">{"".join(shapes)}</svg>'
