"""Bootstrap intervals over images, and the paired test of a difference (Efron & Tibshirani)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hcma_fast.errors import InputError

Indices = NDArray[np.int64]
Score = Callable[[Indices], float]
"""The score of a sample of the images, by their indices; NaN where it has none"""
RESAMPLES = 2000
FEWEST = 5
"""Values whose resamples' percentiles are called a 95% interval (of five: 94%)"""


class Estimate(BaseModel):
    """A score with its 95% interval; the interval is None where none was asked for, or known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    interval: tuple[float, float] | None = None


class Difference(BaseModel):
    """Score of ``a`` minus that of ``b`` on the same images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    """two-sided: twice the smaller share of resamples on either side of 0"""


def share_score(parts: NDArray[np.generic], totals: NDArray[np.generic]) -> Score:
    """Score of a ratio of sums: ``parts`` (n,) of ``totals`` (n,), each per image.

    A sample whose images have nothing to count says nothing: NaN.
    """

    def score(chosen: Indices) -> float:
        total = float(np.sum(totals[chosen]))
        return float(np.sum(parts[chosen])) / total if total else math.nan

    return score


def estimate(
    score: Score, count: int, *, resamples: int = RESAMPLES, plug_in: bool = True, block: int = 1
) -> Estimate:
    """The score of all images and its interval.

    Args:
        plug_in: percentiles of the resamples' scores. False: the score and 1.96 standard deviations
            of the resamples', for scores that a resample's doubles move as a whole, such as FID.
        resamples: 0 for no interval.
        block: neighbours that are drawn together, for a series in which they are alike (moving
            blocks, Kunsch 1989): drawn one by one they would claim to know more than they do.
    """
    value = score(np.arange(count))
    if not resamples or not np.isfinite(value):
        return Estimate(value=value)
    draws = _draws(score, count, resamples, block)
    if not len(draws):
        return Estimate(value=value)
    if plug_in:
        low, high = np.percentile(draws, [2.5, 97.5])
    else:
        spread = 1.96 * float(draws.std(ddof=1))
        low, high = value - spread, value + spread
    return Estimate(value=value, interval=(float(low), float(high)))


def compare(
    metric: str, a: Score, b: Score, count: int, *, resamples: int = RESAMPLES
) -> Difference:
    """Paired bootstrap: both scores on the same resamples of the images.

    Raises:
        InputError: no resample has a score, as nothing was counted.
    """
    everything = np.arange(count)
    first, second = a(everything), b(everything)
    draws = _draws(lambda chosen: a(chosen) - b(chosen), count, resamples)
    if not len(draws):
        raise InputError(
            f"{metric} has no value to compare", value=metric, remedy="Use other layouts."
        )
    difference = first - second
    # A score which resampling shifts (FID) is tested at its own difference. A shift that is within
    # the chance of the draws is left: it would tell draws without any difference from 0.
    shift = difference - float(draws.mean())
    chance = 4 * float(draws.std()) / len(draws) ** 0.5
    centred = draws + shift if abs(shift) > chance else draws
    low, high = np.percentile(centred, [2.5, 97.5])
    below, above = float((centred <= 0).mean()), float((centred >= 0).mean())
    return Difference(
        metric=metric,
        a=first,
        b=second,
        difference=difference,
        interval=(float(low), float(high)),
        # no fewer than one resample in all of them can be told apart from none
        p_value=min(1.0, max(2 * min(below, above), 1 / resamples)),
    )


def _draws(score: Score, count: int, resamples: int, block: int = 1) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    starts, within = count - block + 1, np.arange(block)

    def draw() -> Indices:
        chosen = rng.integers(starts, size=-(-count // block))
        return (chosen[:, None] + within).ravel()[:count]

    found = np.array([score(draw()) for _ in range(resamples)])
    finite: NDArray[np.float64] = found[np.isfinite(found)]
    return finite


def median_ratio(
    a: NDArray[np.float64], b: NDArray[np.float64], *, resamples: int = RESAMPLES
) -> Estimate:
    """Median of ``a`` over that of ``b``, which were measured apart: each is resampled by itself.

    Of fewer than five values there is no interval: that of all resamples is their range, in which
    the true median lies less than 95 times in 100.
    """
    value = float(np.median(a) / np.median(b))
    if min(len(a), len(b)) < FEWEST:
        return Estimate(value=value)
    rng = np.random.default_rng(0)
    above, below = (np.median(rng.choice(x, (resamples, len(x))), axis=1) for x in (a, b))
    low, high = np.percentile(above / below, [2.5, 97.5])
    return Estimate(value=value, interval=(float(low), float(high)))
