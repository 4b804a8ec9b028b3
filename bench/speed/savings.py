"""What each approximate saving gains, and what it costs: time, latents and the judge's score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hcma_fast.bench.quality.metrics.judge.model import Judge
from hcma_fast.bench.quality.scene_images import scene_layout
from hcma_fast.bench.shared.bootstrap import Difference, Estimate, compare, estimate, share_score
from hcma_fast.bench.shared.machine import Machine, describe_machine
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import UsageError
from hcma_fast.runtime.images import to_pil
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.savings import EXACT, Savings
from hcma_fast.train.data.emoji_scenes import Scene, sample_scene

SAVINGS: tuple[Savings, ...] = (
    Savings(align_every=2),
    Savings(align_every=5),
    Savings(guidance_end=0.8),
    Savings(guidance_end=0.6),
    Savings(latent_dtype="bfloat16"),
)
_LARGE = 0.25


class SavingRow(BaseModel):
    """One saving against none, on the same captions, layouts and seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    savings: Savings
    seconds: float
    """per image, median over the batches; decoding is not in it"""
    speedup: float
    """median over the batches, each beside the same batch without savings"""
    speedup_interval: tuple[float, float]
    """10th and 90th percentile"""
    distance: float
    """of the final latents to those without savings, relative, median over the images"""
    distance_p90: float
    judge: Estimate | None
    """share of large boxes that the judge recognises; None where the judge knows no such images"""
    difference: Difference | None
    """of that share to the one without savings"""


class SavingsReport(BaseModel):
    """What :func:`measure_savings` found; the first row is without savings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    backend: str
    weights_hash: str
    settings: AlignmentSettings
    num_inference_steps: int
    batch_size: int
    count: int
    seed: int
    rows: tuple[SavingRow, ...]
    machine: Machine


class _Kept:
    """What is kept of the images of one row."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.latents: list[torch.Tensor] = []
        self.right: list[int] = []


def measure_savings(
    pipe: HCMAPipeline,
    savings: Sequence[Savings] = SAVINGS,
    *,
    count: int = 300,
    seed: int = 0,
    batch_size: int = 10,
    num_inference_steps: int = 50,
    judge: Judge | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SavingsReport:
    """Draw EmojiScenes' test layouts 0 .. count-1 without savings and with each, batch by batch.

    Args:
        seed: image i uses seed + i, in every row.
        judge: None for no score, as with models that draw other pictures.
        progress: called with (images done, count) after each batch.

    Raises:
        UsageError: a number below 1, or no saving.
    """
    if count < 1 or batch_size < 1 or not savings:
        raise UsageError(
            "there must be an image, a batch of at least 1, and a saving",
            value=(count, batch_size, len(savings)),
            remedy="Leave out the options for the defaults.",
        )
    every = [EXACT, *savings]
    kept = [_Kept() for _ in every]
    scenes = [sample_scene("test", index) for index in range(count)]
    large = [
        [min(o.box[2] - o.box[0], o.box[3] - o.box[1]) >= _LARGE for o in scene.objects]
        for scene in scenes
    ]
    for some in every:
        # engines open sessions and measure shapes at their first run
        pipe([""] * batch_size, num_inference_steps=5, savings=some, output_type="latent", seed=0)
    for start in range(0, count, batch_size):
        batch = scenes[start : start + batch_size]
        # every other batch backwards, so that nobody always runs after the same other
        order = range(len(every)) if start // batch_size % 2 else reversed(range(len(every)))
        for number in order:
            began = perf_counter()
            z = pipe(
                [s.captions[i % len(s.captions)] for i, s in enumerate(batch, start)],
                [scene_layout(s) for s in batch],
                num_inference_steps=num_inference_steps,
                savings=every[number],
                seed=[seed + start + i for i in range(len(batch))],
                output_type="latent",
            ).latents.cpu()
            kept[number].seconds.append((perf_counter() - began) / len(batch))
            kept[number].latents.append(z)
            if judge is not None:
                kept[number].right += _right(pipe, judge, z, start, large, scenes)
        if progress is not None:
            progress(start + len(batch), count)
    total = np.array([sum(some) for some in large])
    return SavingsReport(
        preset=pipe.preset,
        backend=pipe.backend,
        weights_hash=pipe.weights_hash,
        settings=pipe.settings,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        count=count,
        seed=seed,
        rows=tuple(_row(s, own, kept[0], total) for s, own in zip(every, kept, strict=True)),
        machine=describe_machine(),
    )


def _right(
    pipe: HCMAPipeline,
    judge: Judge,
    z: torch.Tensor,
    start: int,
    large: Sequence[Sequence[bool]],
    scenes: Sequence[Scene],
) -> list[int]:
    """Per image, the large boxes in which the judge sees what was asked for."""
    with torch.no_grad():
        images = np.stack([np.asarray(i) for i in to_pil(pipe.decode(z.to(pipe.device)))])
    objects = [scene.objects for scene in scenes[start : start + len(z)]]
    verdicts = judge.predict(images, [[o.box for o in some] for some in objects])
    return [
        sum(v.category == o.category and ok for v, o, ok in zip(seen, some, counted, strict=True))
        for seen, some, counted in zip(
            verdicts, objects, large[start : start + len(z)], strict=True
        )
    ]


def _row(savings: Savings, own: _Kept, exact: _Kept, total: NDArray[np.int64]) -> SavingRow:
    seconds, yardstick = np.array(own.seconds), np.array(exact.seconds)
    low, ratio, high = np.percentile(yardstick / seconds, [10, 50, 90]).tolist()
    ours, theirs = torch.cat(own.latents).flatten(1), torch.cat(exact.latents).flatten(1)
    distance = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).numpy()
    judge, difference = None, None
    if own.right and total.sum():
        mine, other = (share_score(np.array(some.right), total) for some in (own, exact))
        judge = estimate(mine, len(total))
        if own is not exact:
            difference = compare("large boxes", mine, other, len(total))
    return SavingRow(
        savings=savings,
        seconds=float(np.median(seconds)),
        speedup=ratio,
        speedup_interval=(low, high),
        distance=float(np.median(distance)),
        distance_p90=float(np.percentile(distance, 90)),
        judge=judge,
        difference=difference,
    )
