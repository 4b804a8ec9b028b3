"""What a soak found, and what it says of memory and latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from hcma_fast.bench.shared.bootstrap import Estimate, Indices, estimate
from hcma_fast.bench.shared.machine import Machine
from hcma_fast.errors import InputError
from hcma_fast.files import read_file

_BLOCKS = 10
"""Of rounds, that the slope's interval resamples: memory is like that of the rounds before, and
moves in steps, as an allocator asks for more and gives back when it likes"""
JUDGED_ROUNDS = 20
"""Fewer say nothing of slopes"""
_GROWTH, _SLOWER = 0.01, 1.05
"""What is a fault: a share in an hour; latency over that of the beginning"""


class SoakReport(BaseModel):
    """What :func:`soak` found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    backend: str
    minutes: float
    rounds: int
    """in both processes"""
    images: int
    refused: dict[str, int]
    """bad requests by their kind, each with its own typed error"""
    full_disks: int
    """images that could not be written, each with a typed error and without half a file, and could
    be written afterwards"""
    kills: int
    same_image: bool
    """the reference images were the same in every round and in both processes, to the last bit"""
    image_sha256: str
    seconds: tuple[float, ...]
    """of the reference batch, per round of the second process"""
    at_s: tuple[float, ...]
    """when those rounds ended, since that process had loaded"""
    rss_mib: tuple[float, ...]
    """after those rounds"""
    judged_rounds: int
    """those of the second process, without its beginning, that memory and latency are judged by"""
    rss_mib_per_hour: Estimate | None
    """by least squares over the judged rounds, with a 95% interval by bootstrap over blocks of
    them; None for too few"""
    allocated_mib: tuple[float, ...] = ()
    """what the C library's allocator had handed out after those rounds; none where it cannot say"""
    allocated_mib_per_hour: Estimate | None = None
    """as ``rss_mib_per_hour``: what leaks, and not what an allocator keeps"""
    python_blocks: tuple[int, ...] = ()
    """small objects of Python (``sys.getallocatedblocks``) after those rounds"""
    python_blocks_per_hour: Estimate | None = None
    latency_drift: Estimate | None
    """median of the last third of the judged rounds over that of the first; None for too few"""
    machine: Machine

    @property
    def not_judged(self) -> str | None:
        """Why nothing is said of memory and latency; None if they are judged."""
        if self.rss_mib_per_hour is not None and self.latency_drift is not None:
            return None
        return (
            f"NOT JUDGED: memory and latency. {self.judged_rounds} rounds count, and it takes "
            f"{JUDGED_ROUNDS}: soak for longer"
        )

    @property
    def problems(self) -> list[str]:
        """What it should not have done, beyond chance; see ``not_judged`` for what is unknown."""
        found = [] if self.same_image else ["the same request gave another image"]
        return found + [one.told for one in self._judged() if one.low > one.limit]

    @property
    def not_shown(self) -> list[str]:
        """What may have grown by more than is allowed, and may not: it takes a longer soak."""
        return [one.told for one in self._judged() if one.low <= one.limit < one.high]

    def _judged(self) -> list[_Judged]:
        slopes: dict[str, tuple[Sequence[float], Estimate | None]] = {
            "Python's objects grow": (self.python_blocks, self.python_blocks_per_hour)
        }
        if self.allocated_mib:
            of_c = (self.allocated_mib, self.allocated_mib_per_hour)
            slopes["what is allocated (MiB) grows"] = of_c
        else:
            slopes["memory (MiB) grows"] = (self.rss_mib, self.rss_mib_per_hour)
        found = []
        for what, (values, slope) in slopes.items():
            if slope is not None and slope.interval is not None:
                most = _GROWTH * float(np.median(values))
                told = (f"{what} in an hour", "+,.1f")
                found.append(_Judged(*told, slope.value, *slope.interval, most))
        drift = self.latency_drift
        if drift is not None and drift.interval is not None:
            what = "latency, the last third over the first"
            found.append(_Judged(what, ".3f", drift.value, *drift.interval, _SLOWER))
        return found


class _Judged(NamedTuple):
    """A figure with its interval, and how large it may be."""

    what: str
    form: str
    value: float
    low: float
    high: float
    limit: float

    @property
    def told(self) -> str:
        figures = (self.value, self.low, self.high, self.limit)
        value, low, high, limit = (format(figure, self.form) for figure in figures)
        return f"{self.what}: {value} ({low} to {high}; the limit is {limit})"


def read_soak(path: Path) -> SoakReport | None:
    """The report that ``hcma-fast bench soak --out`` wrote to ``path``; None if it is none."""
    try:
        return SoakReport.model_validate_json(read_file(path, "the report"))
    except (InputError, ValidationError):
        return None


def slope_per_hour(at_s: NDArray[np.float64], values: NDArray[np.float64]) -> Estimate:
    """Least squares, with the interval over resampled blocks of neighbours."""

    def slope(chosen: Indices) -> float:
        times = at_s[chosen] / 3600
        spread = times - times.mean()
        return float((spread * values[chosen]).sum() / (spread**2).sum())

    return estimate(slope, len(values), block=-(-len(values) // _BLOCKS))


def drift(seconds: NDArray[np.float64]) -> Estimate:
    """Median of the last third over that of the first, with an interval over blocks of rounds,
    of about 95%: for rounds that are much alike it is too narrow (70% in a simulation)."""
    third = len(seconds) // 3
    first, last = seconds[:third], seconds[-third:]

    def ratio(chosen: Indices) -> float:
        return float(np.median(last[chosen]) / np.median(first[chosen]))

    return estimate(ratio, third, block=-(-third // _BLOCKS))
