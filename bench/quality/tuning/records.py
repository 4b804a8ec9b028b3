"""What a search for alignment settings is asked, and what it finds."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from hcma_fast.bench.quality.metrics.judge.model import CONFIDENCE_FLOOR
from hcma_fast.bench.shared.bootstrap import estimate
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import UsageError

Scores = NDArray[np.float64]
"""of layouts, (B,); NaN where there is none"""
ScoreName = Literal["recognised", "confidence"]
"""of an image: the share of its large boxes in which the judge sees the requested category; or the
judge's log-probability of that category, mean over all of its boxes"""
Readings = dict[ScoreName, Scores]
"""every score of the same layouts"""
WORST: dict[ScoreName, float] = {"recognised": 0.0, "confidence": CONFIDENCE_FLOOR}
Verdict = Literal["better", "undecided", "not better"]


class Plan(BaseModel):
    """What decides the outcome of every trial, so a search with another plan is another search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: AlignmentSettings
    """the checkpoint's own; guidance, grounding and the mode (normalized) are kept"""
    eta0_range: tuple[float, float]
    count: int = Field(100, ge=1)
    """layouts of a trial: 0 .. count-1"""
    confirm: int = Field(100, ge=1)
    """layouts of the last comparison: the next ones"""
    chunk: int = Field(40, ge=1)
    """layouts between two chances to prune"""
    seed: int = Field(0, ge=0)
    score: ScoreName
    """what the search makes as large as it can"""


class Comparison(BaseModel):
    """Scores with and without alignment on the same layouts; 95% bootstrap over images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    score: float
    off: float
    difference: float
    interval: tuple[float, float]


class TrialRecord(BaseModel):
    """One setting that was tried; number 0 is the alignment off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    state: Literal["off", "complete", "pruned", "diverged"]
    eta0: float
    window: tuple[float, float]
    lambda_global: float
    lambda_local: float
    comparison: Comparison | None
    """over the layouts that it was tried on; None when it diverged"""


class TuningReport(BaseModel):
    """All trials, the best one, and whether it is better than no alignment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Plan
    trials: list[TrialRecord]
    best: int | None
    """number of the best complete trial; None when all diverged"""
    tied: list[int]
    """other complete trials of the same score; the best is the one with the smallest eta0"""
    settings: AlignmentSettings | None
    """the best trial's"""
    confirmation: Comparison | None
    """the best trial on layouts that the search never saw"""
    recognised: Comparison | None
    """the same by the large boxes recognised; None where the search went by them, or none is large
    """
    verdict: Verdict
    """"better": the confirmation's interval is above 0; "not better": its difference is not"""
    date: str


def compare(scores: Scores, off: Scores) -> Comparison:
    """Means and their paired difference over the images that have a score, (B,) each."""
    both = np.stack([scores, off])
    both = both[:, ~np.isnan(both).any(0)]
    if not both.shape[1]:
        raise UsageError(
            "none of these layouts has a box that counts",
            value=len(scores),
            remedy="Use more layouts, such as --count 100.",
        )
    gains = both[0] - both[1]
    gain = estimate(lambda chosen: float(gains[chosen].mean()), len(gains))
    assert gain.interval is not None  # gains are finite
    return Comparison(
        images=len(gains),
        score=float(both[0].mean()),
        off=float(both[1].mean()),
        difference=gain.value,
        interval=gain.interval,
    )
