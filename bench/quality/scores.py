"""From measured images to scores with intervals, costs and paired comparisons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hcma_fast.bench.quality.generate import BLOCK, ImageRecord, RunSettings, load_records
from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.measure import REAL, Instruments, Measured, block_file
from hcma_fast.bench.quality.methods.table import Method
from hcma_fast.bench.quality.metrics.detection import Detection, best_ious, counts_match, layout_ap
from hcma_fast.bench.quality.metrics.fidelity import fid, kid, precision_recall
from hcma_fast.bench.quality.metrics.judge.model import CONFIDENCE_FLOOR
from hcma_fast.bench.quality.metrics.networks import FeatureNetwork
from hcma_fast.bench.shared.bootstrap import (
    Difference,
    Estimate,
    Score,
    compare,
    estimate,
    share_score,
)
from hcma_fast.bench.shared.machine import Machine, describe_machine
from hcma_fast.errors import InputError, UsageError

MIN_SIDE = 0.25
"""Least side of a large box, as a share of the image's: below it `tiny` has few pixels"""
_MOST_ROWS = 10_000
"""Rows that KID, precision and recall take, the first ones; FID takes all, part by part"""
_RESAMPLED_ROWS, _RESAMPLED_WIDTH, _SET_RESAMPLES = 2_000, 512, 50
"""Up to these sizes the scores of sets have intervals"""
LOWER_IS_BETTER = ("Frechet", "FID", "KID")


class Cost(BaseModel):
    """What an image took, means over images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: Estimate
    unet_forward: float
    """passes beyond the sampler's own, as the next two"""
    unet_backward: float
    aligner_passes: float
    """forward and backward"""
    peak_memory_mib: float
    own_process: bool
    """False: other methods ran in the same process before, and may have raised the peak"""
    batch_sizes: list[int]


class MethodScores(BaseModel):
    """A row of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    name: str
    eta0: float
    scores: dict[str, Estimate]
    cost: Cost | None
    """None for real images"""
    losses: list[float | None]
    """mean loss of each step over the images that had one"""


class EvalReport(BaseModel):
    """scores.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunSettings
    titles: dict[str, str]
    real_images: str
    methods: list[MethodScores]
    real: MethodScores | None
    differences: list[Difference]
    machine: Machine
    command: str
    date: str


@dataclass(frozen=True)
class _Scored:
    """A score by a sample of images, and how its interval is made."""

    score: Score
    resamples: int = 2000
    plug_in: bool = True


class _Blocks:
    """The measurements of one method, read part by part."""

    def __init__(self, out: Path, folder: str, digest: str, items: Sequence[EvalItem]) -> None:
        self._files = [block_file(out, folder, digest, s) for s in range(0, len(items), BLOCK)]
        self._folder = folder

    def __iter__(self) -> Iterator[Measured]:
        for path in self._files:
            block = Measured.from_file(path)
            if block is None:
                raise InputError(
                    f"measurements of {self._folder} are missing",
                    value=str(path),
                    remedy="Measure them first: run all shards with --stage measure.",
                )
            yield block

    def joined(self, name: str, most: int | None = None) -> NDArray[np.float32]:
        """One array of all blocks, or its first rows."""
        parts, rows = [], 0
        for block in self:
            parts.append(getattr(block, name))
            rows += len(parts[-1])
            if most is not None and rows >= most:
                break
        found: NDArray[np.float32] = np.concatenate(parts)[:most]
        return found

    def detections(self) -> list[list[Detection]]:
        return [some for block in self for some in block.detections]


def score_run(
    instruments: Instruments,
    methods: Sequence[Method],
    items: Sequence[EvalItem],
    run: RunSettings,
    out: Path,
    *,
    pairs: Sequence[tuple[str, str]] = (),
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> EvalReport:
    """All scores of all methods.

    Args:
        pairs: labels of methods to compare, on every score that has an interval.

    Raises:
        InputError: images or measurements are missing. UsageError: a pair names no method.
    """
    check_pairs(methods, pairs)
    left_out = instruments.too_few(items)
    left_out = {"left out": "; ".join(left_out.values())} if left_out else {}
    digest = instruments.digest(run)
    has_real = all(item.has_real for item in items)
    real = _Blocks(out, REAL, digest, items) if has_real else None
    rows: list[MethodScores] = []
    found: dict[str, dict[str, _Scored]] = {}
    records_of = [load_records(out, method, items, run) for method in methods]
    processes = Counter(name for some in records_of for name in {r.process for r in some})
    for method, records in zip(methods, records_of, strict=True):
        if progress is not None:
            progress(method.label)
        blocks = _Blocks(out, method.folder, digest, items)
        scored = _scored(instruments, items, blocks, real)
        found[method.label] = scored
        rows.append(
            MethodScores(
                method=method.label,
                name=method.name,
                eta0=0.0 if method.guided else method.settings(run.settings).eta0,
                scores=_estimates(scored, len(items)),
                cost=_cost(records, processes),
                losses=_mean_losses(records),
            )
        )
    ceiling = None
    if real is not None:
        ceiling = MethodScores(
            method="real images",
            name=REAL,
            eta0=0.0,
            scores=_estimates(_scored(instruments, items, real, None), len(items)),
            cost=None,
            losses=[],
        )
    return EvalReport(
        run=run,
        titles=instruments.titles | left_out,
        real_images=_describe_real(items, instruments),
        methods=rows,
        real=ceiling,
        differences=[
            compare(
                f"{name}: {a} - {b}",
                found[a][name].score,
                found[b][name].score,
                len(items),
                resamples=found[a][name].resamples,
            )
            for a, b in pairs
            for name in found[a]
            if found[a][name].resamples and _has_value(rows, (a, b), name)
        ],
        machine=describe_machine(),
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _has_value(rows: Sequence[MethodScores], labels: tuple[str, str], name: str) -> bool:
    """Did both methods get this score? Without large boxes, for example, none has theirs."""
    values = [row.scores[name].value for row in rows if row.method in labels]
    return bool(np.isfinite(values).all())


def check_pairs(methods: Sequence[Method], pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse a comparison of what is not there.

    Raises:
        UsageError.
    """
    labels = [method.label for method in methods]
    for pair in pairs:
        for name in pair:
            if name not in labels:
                raise UsageError(
                    "a comparison names a method that is not in the run",
                    value=name,
                    remedy=f"Methods of this run: {', '.join(labels)}.",
                )


def _describe_real(items: Sequence[EvalItem], instruments: Instruments) -> str:
    if not all(item.has_real for item in items):
        return "none"
    if items[0].scene is not None:
        return "renders of the same scenes"
    return "given images, scaled" if instruments.resize_real else "given images"


def _estimates(scored: dict[str, _Scored], count: int) -> dict[str, Estimate]:
    return {
        name: estimate(item.score, count, resamples=item.resamples, plug_in=item.plug_in)
        for name, item in scored.items()
    }


def _scored(
    instruments: Instruments, items: Sequence[EvalItem], blocks: _Blocks, real: _Blocks | None
) -> dict[str, _Scored]:
    """Every score of one method; scores of sets only where there is something real to compare."""
    owners = np.repeat(np.arange(len(items)), [len(item.layout) for item in items])
    wanted = set(instruments.metrics)
    scored: dict[str, _Scored] = {}

    def share(values: NDArray[np.generic], counted: NDArray[np.bool_] | None = None) -> _Scored:
        """Mean of a value per box, or of some of them."""
        keep = np.ones(len(values), np.bool_) if counted is None else counted
        total = np.bincount(owners, keep, len(items))
        return _ratio(np.bincount(owners, values.astype(np.float64) * keep, len(items)), total)

    sides = np.array([min(b[2] - b[0], b[3] - b[1]) for item in items for b in item.layout.boxes])
    if "judge" in wanted:
        judged = blocks.joined("judged")
        scored["region judge, large boxes"] = share(judged, sides >= MIN_SIDE)
        scored["region judge"] = share(judged)
        own = np.maximum(blocks.joined("log_probability"), CONFIDENCE_FLOOR)
        scored["region judge, log-probability"] = share(own)
        right = np.bincount(owners, judged, len(items)) == np.bincount(owners, minlength=len(items))
        counted, clear = blocks.joined("counted"), blocks.joined("clear")
        for name, values in (
            ("images with every box right", right),
            ("images with nothing outside the boxes", clear),
            ("objects counted right", counted.astype(np.bool_) & clear.astype(np.bool_)),
        ):
            scored[name] = _ratio(values.astype(np.float64), np.ones(len(items)))
    if "likeness" in wanted:
        seen = blocks.joined("recognised")
        scored["recognised by likeness, large boxes"] = share(seen, sides >= MIN_SIDE)
        scored["recognised by likeness"] = share(seen)
    if "clip" in wanted:
        scored["CLIP, caption"] = _ratio(blocks.joined("clip"), np.ones(len(items)))
        scored["CLIP, box and label"] = share(blocks.joined("clip_label"))
        scored['CLIP, box and "a photo of a"'] = share(blocks.joined("clip_photo"))
    if "detector" in wanted:
        scored |= _detector_scores(items, blocks.detections(), share)
    if real is not None and instruments.features is not None:
        network = instruments.features
        for what, attribute in (("", "whole"), (" of boxes", "crops")):
            rows = np.arange(len(items)) if attribute == "whole" else owners
            scored |= _set_scores(wanted, network, what, attribute, rows, blocks, real)
    return scored


def _ratio(parts: NDArray[np.generic], totals: NDArray[np.generic]) -> _Scored:
    return _Scored(share_score(parts, totals))


def _detector_scores(
    items: Sequence[EvalItem],
    found: list[list[Detection]],
    share: Callable[[NDArray[np.generic]], _Scored],
) -> dict[str, _Scored]:
    layouts = [item.layout for item in items]
    overlaps = [
        value
        for layout, some in zip(layouts, found, strict=True)
        for value in best_ious(layout, some)
    ]
    counts = [counts_match(layout, some) for layout, some in zip(layouts, found, strict=True)]
    ap, ap50 = layout_ap(layouts, found)
    return {
        # resampled, AP would match detections anew 2000 times: it has no interval
        "layout AP": _Scored(lambda _: ap, resamples=0),
        "layout AP50": _Scored(lambda _: ap50, resamples=0),
        "mean IoU": share(np.array(overlaps)),
        "counting accuracy": _ratio(np.array(counts, np.float64), np.ones(len(items))),
    }


def _set_scores(
    wanted: set[str],
    network: FeatureNetwork,
    what: str,
    attribute: str,
    owners: NDArray[np.int64],
    blocks: _Blocks,
    real: _Blocks,
) -> dict[str, _Scored]:
    """FID and its kin of whole images, or of boxes; a resample takes an image and its boxes."""
    mine, theirs = blocks.joined(attribute, _MOST_ROWS), real.joined(attribute, _MOST_ROWS)
    width, count = theirs.shape[1], int(owners[-1]) + 1 if len(owners) else 0
    owners = owners[:_MOST_ROWS]
    rows_of = [np.flatnonzero(owners == i) for i in range(count)] if len(theirs) <= 20_000 else []
    small = len(owners) <= _RESAMPLED_ROWS and width <= _RESAMPLED_WIDTH
    resamples = _SET_RESAMPLES if small else 0
    name = f"({network.title}){what}"
    scored: dict[str, _Scored] = {}

    def rows(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([rows_of[i] for i in chosen if i < count])

    def distance(chosen: NDArray[np.int64]) -> float:
        if _is_everything(chosen):
            return fid(
                (getattr(block, attribute) for block in real),
                (getattr(block, attribute) for block in blocks),
                width,
            )
        some = rows(chosen)
        # a resample can have fewer boxes than all images have
        return fid([theirs[some]], [mine[some]], width) if len(some) > width else math.nan

    def kernel(chosen: NDArray[np.int64]) -> float:
        if _is_everything(chosen):
            return kid(theirs, mine)
        some = rows(chosen)
        return kid(theirs[some], mine[some]) if len(some) > 1 else math.nan

    if "fid" in wanted and len(owners) > width:
        scored[f"{network.distance} {name}"] = _Scored(distance, resamples, plug_in=False)
    if "kid" in wanted and len(mine) > 1:
        scored[f"KID {name}"] = _Scored(kernel, resamples, plug_in=False)
    if "precision-recall" in wanted and len(mine) > 3:
        both = precision_recall(theirs, mine)
        # a resample's doubles are their own neighbours, so these have no bootstrap
        scored[f"precision {name}"] = _Scored(lambda _: both[0], resamples=0)
        scored[f"recall {name}"] = _Scored(lambda _: both[1], resamples=0)
    return scored


def _is_everything(chosen: NDArray[np.int64]) -> bool:
    return bool((chosen == np.arange(len(chosen))).all())


def _cost(records: Sequence[ImageRecord], processes: Counter[str]) -> Cost:
    """Means over images; ``processes``: how many methods were made in each."""
    seconds = np.array([record.seconds for record in records])
    return Cost(
        seconds=estimate(lambda chosen: float(seconds[chosen].mean()), len(seconds)),
        unet_forward=float(np.mean([record.unet_forward for record in records])),
        unet_backward=float(np.mean([record.unet_backward for record in records])),
        aligner_passes=float(np.mean([record.aligner_passes for record in records])),
        peak_memory_mib=max(record.peak_memory_mib for record in records),
        own_process=all(processes[record.process] == 1 for record in records),
        batch_sizes=sorted({record.batch_size for record in records}),
    )


def _mean_losses(records: Sequence[ImageRecord]) -> list[float | None]:
    steps = max((len(record.losses) for record in records), default=0)
    means: list[float | None] = []
    for step in range(steps):
        values = [r.losses[step] for r in records if len(r.losses) > step]
        known = [value for value in values if value is not None]
        means.append(float(np.mean(known)) if known else None)
    return means
