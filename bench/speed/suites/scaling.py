"""How the time of a run grows with boxes, pixels, steps and batch: exponents, and straight lines.

An exponent below 1 is a cost that is paid once per run, or one that grows ever less; the straight
line tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hcma_fast.bench.shared.bootstrap import FEWEST, RESAMPLES, Indices, estimate
from hcma_fast.bench.shared.plots import figure_png, new_figure
from hcma_fast.bench.speed.harness.contestants import SD14, Ours, Work
from hcma_fast.bench.speed.harness.plan import Plan
from hcma_fast.bench.speed.harness.report import Fit, Row
from hcma_fast.bench.speed.harness.rounds import Case, Group
from hcma_fast.bench.speed.plain_and_ours import ours_case

Floats = NDArray[np.float64]


def scaling(plan: Plan) -> list[Group]:
    """Our pipeline at growing sizes, a group for each quantity; the others stay as they are.

    At full size and for a quick run two sizes each: the models of a group are in memory together.
    """
    base = plan.work(1)
    steps = "evaluations" if base.evaluations else "steps"
    sizes: dict[str, tuple[int, ...]] = {
        "boxes": (1, 2, 4, 8, 16, 30),
        "pixels": (32, 64, 96, 128),
        steps: (10, 20, 40, 80),
        "batch": (1, 2, 4, 8, 16),
    }
    if plan.on_gpu:
        # each case is a process that loads for some seconds
        sizes = {"boxes": (1, 8, 30), "pixels": (32, 64, 128), steps: (10, 20, 80)}
        sizes["batch"] = (1, 4, 16)
    if plan.model == SD14:
        sizes |= {"pixels": (256, 512), steps: (1, 3), "batch": (1, 4)}
    if plan.quick:
        sizes |= {steps: (1, 3) if steps == "evaluations" else (2, 8), "batch": (1, 4)}
        del sizes["pixels"]  # which takes engines, or a model, of that size
    if plan.quick or plan.model == SD14:
        sizes = {axis: (values[0], values[-1]) for axis, values in sizes.items()}
    fields = {"boxes": "boxes", "pixels": "side", steps: steps, "batch": "batch"}
    return [
        Group(
            axis,
            [_case(plan, axis, value, replace(base, **{fields[axis]: value})) for value in values],
        )
        for axis, values in sizes.items()
    ]


def _case(plan: Plan, axis: str, value: int, work: Work) -> Case:
    size = value * value if axis == "pixels" else value
    # engines of a size are built in minutes on a card, so there torch tells of the pixels
    ours = Ours("eager") if axis == "pixels" and plan.on_gpu else plan.leading[-1]
    case = ours_case(plan.model, ours, work, plan.device, f"{axis} {size}")
    # other sizes give other images: nothing to compare
    return replace(case, max_error=None, labels={**case.labels, axis: size})


def fit_scaling(rows: Sequence[Row]) -> tuple[Fit, ...]:
    """One fit for each group of at least two sizes; the rounds are what is resampled."""
    found = []
    for axis in dict.fromkeys(row.group for row in rows):
        of_axis = [row for row in rows if row.group == axis]
        if len(of_axis) < 2:
            continue
        sizes = np.array([float(row.labels[axis]) for row in of_axis])
        # (sizes, rounds): a round ran all sizes, one after the other
        seconds = np.array([row.seconds for row in of_axis])
        rounds = seconds.shape[1]
        resamples = RESAMPLES if rounds >= FEWEST else 0

        def exponent(chosen: Indices, x: Floats = sizes, s: Floats = seconds) -> float:
            logs = np.log(np.median(s[:, chosen], axis=1))
            spread = np.log(x) - np.log(x).mean()
            return float((spread * logs).sum() / (spread**2).sum())

        def growth(chosen: Indices, s: Floats = seconds) -> float:
            medians = np.median(s[:, chosen], axis=1)
            return float(medians[-1] / medians[0])

        def fixed(chosen: Indices, x: Floats = sizes, s: Floats = seconds) -> float:
            return float(_line(x, np.median(s[:, chosen], axis=1))[0])

        medians = np.median(seconds, axis=1)
        start, slope = _line(sizes, medians)
        found.append(
            Fit(
                axis=axis,
                sizes=tuple(sizes.tolist()),
                median_s=tuple(medians.tolist()),
                exponent=estimate(exponent, rounds, resamples=resamples),
                growth=estimate(growth, rounds, resamples=resamples),
                fixed_s=estimate(fixed, rounds, resamples=resamples),
                off_line=(
                    float(np.abs((start + slope * sizes) / medians - 1).max())
                    if len(sizes) > 2  # through two points there always is one
                    else None
                ),
            )
        )
    return tuple(found)


def _line(x: Floats, y: Floats) -> Floats:
    """Start and slope of the straight line with the least squares of relative errors."""
    found = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones_like(y), rcond=None)[0]
    return found.astype(np.float64)


def scaling_png(fits: Sequence[Fit]) -> bytes:
    """Seconds against each quantity, in log-log, with the fitted lines, as a PNG."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure = new_figure(3.6 * len(fits), 3.4)
    for axes, fit in zip(figure.subplots(1, len(fits), squeeze=False)[0], fits, strict=True):
        sizes, seconds = np.array(fit.sizes), np.array(fit.median_s)
        slope = fit.exponent.value
        start = float(np.exp(np.mean(np.log(seconds)) - slope * np.mean(np.log(sizes))))
        axes.loglog(sizes, seconds, "o", color="tab:blue")
        axes.loglog(sizes, start * sizes**slope, color="tab:orange", label=f"exponent {slope:.2f}")
        axes.set_xlabel(fit.axis)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        # what hardly changes must not fill the axis
        low, high = seconds.min() / 1.5, seconds.max() * 1.5
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend()
    figure.axes[0].set_ylabel("seconds per run, median")
    return figure_png(figure)
