"""Quality on EmojiScenes' layouts: does the judge see in each box what was asked for?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hcma_fast.bench.quality.metrics.judge.model import Judge, Verdict
from hcma_fast.bench.quality.metrics.likeness.model import LikenessJudge
from hcma_fast.bench.quality.scene_images import generate_images, save_grid
from hcma_fast.bench.shared.bootstrap import estimate, share_score
from hcma_fast.config import AlignmentSettings, SettingsChange
from hcma_fast.errors import UsageError
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.train.data.emoji_scenes import (
    CATEGORY_NAMES,
    HELD_OUT_PAIRS,
    Scene,
    Split,
    render_scene,
    sample_scene,
)


class Share(BaseModel):
    """``correct`` of ``total`` boxes; the interval is a 95% bootstrap over images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    correct: int
    total: int
    accuracy: float | None
    """None without boxes"""
    interval: tuple[float, float] | None


class LikenessShares(BaseModel):
    """Boxes that the likeness judge recognises."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    threshold: float
    large_boxes: Share
    all_boxes: Share
    ceiling_large_boxes: Share
    """on real renders of the same layouts"""
    ceiling_all_boxes: Share
    per_category: dict[str, Share]
    """large boxes by the category asked for"""


class QualityReport(BaseModel):
    """What :func:`evaluate` found, and all that it takes to find it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    backend: str
    weights_hash: str
    engine_hash: str | None
    judge_sha256: str
    split: Split
    count: int
    seed: int
    num_inference_steps: int
    settings: AlignmentSettings
    min_side: float
    large_boxes: Share
    """boxes with both sides of at least ``min_side`` of the image: the figure of the model card"""
    all_boxes: Share
    held_out_pairs: Share
    """large boxes of images with a pair of categories that training never showed together"""
    ceiling_large_boxes: Share
    """the judge on real renders of the same layouts: no generator can expect more"""
    ceiling_all_boxes: Share
    per_category: dict[str, Share]
    """large boxes by the category asked for"""
    mistaken_for: list[tuple[str, str, int]]
    """asked for, seen, how often (large boxes), the most frequent first"""
    likeness: LikenessShares
    date: str


def evaluate(
    pipe: HCMAPipeline,
    *,
    count: int = 300,
    split: Split = "test",
    seed: int = 0,
    batch_size: int = 10,
    min_side: float = 0.25,
    eta0: float | None = None,
    guidance_scale: float | None = None,
    lambda_global: float | None = None,
    lambda_local: float | None = None,
    align_window: tuple[float, float] | None = None,
    num_inference_steps: int = 50,
    work: Path | None = None,
    judge: Judge | None = None,
    likeness: LikenessJudge | None = None,
    grid: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QualityReport:
    """Generate one image for each of the layouts 0 .. count-1 of ``split``; both judges judge all
    boxes.

    Args:
        seed: image i uses seed + i, whatever the other settings are.
        eta0, guidance_scale, lambda_global, lambda_local, align_window: default the checkpoint's
            own; ``eta0=0`` switches the alignment off.
        work: folder that keeps finished batches, so that a stopped run goes on where it was.
        grid: PNG file for a contact sheet of the first 64 images; green boxes are recognised.
        progress: called with (images done, count) after each batch.

    Raises:
        UsageError: no images, or no batch, is asked for, or a setting is out of range.
        WeightsError: a judge is missing or damaged.
    """
    if count < 1 or batch_size < 1:
        raise UsageError(
            "count and batch size must be at least 1", value=(count, batch_size), remedy="Use 300."
        )
    judge, likeness = judge or Judge.load(), likeness or LikenessJudge.load()
    settings = SettingsChange.of(
        eta0=eta0,
        guidance_scale=guidance_scale,
        lambda_global=lambda_global,
        lambda_local=lambda_local,
        window=align_window,
    ).over(pipe.settings)
    scenes = [sample_scene(split, index) for index in range(count)]
    images = generate_images(
        pipe, scenes, split, seed, batch_size, settings, num_inference_steps, work, progress
    )
    boxes = [[item.box for item in scene.objects] for scene in scenes]
    verdicts = judge.predict(images, boxes)
    if grid is not None:
        save_grid(grid, images, scenes, verdicts)
    renders = np.stack(
        [np.asarray(render_scene(s, split, i, pipe.image_size)) for i, s in enumerate(scenes)]
    )
    hits = _hits(scenes, verdicts)
    ceiling = _hits(scenes, judge.predict(renders, boxes))
    every = [[True] * len(some) for some in boxes]
    large = [[min(b[2] - b[0], b[3] - b[1]) >= min_side for b in some] for some in boxes]
    unseen = [
        [ok and _is_held_out(s) for ok in some] for s, some in zip(scenes, large, strict=True)
    ]
    return QualityReport(
        preset=pipe.preset,
        backend=pipe.backend,
        weights_hash=pipe.weights_hash,
        engine_hash=pipe.engine_hash,
        judge_sha256=judge.card.sha256,
        split=split,
        count=count,
        seed=seed,
        num_inference_steps=num_inference_steps,
        settings=settings,
        min_side=min_side,
        large_boxes=measure(hits, large),
        all_boxes=measure(hits, every),
        held_out_pairs=measure(hits, unseen),
        ceiling_large_boxes=measure(ceiling, large),
        ceiling_all_boxes=measure(ceiling, every),
        per_category={name: measure(hits, _only(name, scenes, large)) for name in CATEGORY_NAMES},
        mistaken_for=_mistakes(scenes, verdicts, large),
        likeness=_likeness_shares(likeness, scenes, images, renders, large),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _likeness_shares(
    judge: LikenessJudge,
    scenes: Sequence[Scene],
    images: NDArray[np.uint8],
    renders: NDArray[np.uint8],
    large: list[list[bool]],
) -> LikenessShares:
    """The likeness judge on generated images and on renders, (B, H, W, 3) both."""
    hits, ceiling = (
        [
            judge.recognised(
                picture,
                [item.box for item in scene.objects],
                [item.phrase for item in scene.objects],
                edition=1,
            )
            for picture, scene in zip(pictures, scenes, strict=True)
        ]
        for pictures in (images, renders)
    )
    every = [[True] * len(some) for some in large]
    return LikenessShares(
        sha256=judge.card.sha256,
        threshold=judge.threshold,
        large_boxes=measure(hits, large),
        all_boxes=measure(hits, every),
        ceiling_large_boxes=measure(ceiling, large),
        ceiling_all_boxes=measure(ceiling, every),
        per_category={name: measure(hits, _only(name, scenes, large)) for name in CATEGORY_NAMES},
    )


def measure(hits: Sequence[Sequence[bool]], counted: Sequence[Sequence[bool]]) -> Share:
    """Share of right verdicts among the counted boxes, with a bootstrap interval over images."""
    right = np.array(
        [
            sum(h and c for h, c in zip(*pair, strict=True))
            for pair in zip(hits, counted, strict=True)
        ]
    )
    total = np.array([sum(some) for some in counted])
    if not total.sum():
        return Share(correct=0, total=0, accuracy=None, interval=None)
    found = estimate(share_score(right, total), len(total))
    return Share(
        correct=int(right.sum()),
        total=int(total.sum()),
        accuracy=found.value,
        interval=found.interval,
    )


def _hits(scenes: Sequence[Scene], verdicts: Sequence[Sequence[Verdict]]) -> list[list[bool]]:
    return [
        [v.category == o.category for v, o in zip(seen, scene.objects, strict=True)]
        for scene, seen in zip(scenes, verdicts, strict=True)
    ]


def _only(name: str, scenes: Sequence[Scene], counted: list[list[bool]]) -> list[list[bool]]:
    return [
        [ok and o.category == name for ok, o in zip(some, scene.objects, strict=True)]
        for scene, some in zip(scenes, counted, strict=True)
    ]


def _is_held_out(scene: Scene) -> bool:
    names = {item.category for item in scene.objects}
    return any(frozenset(pair) in HELD_OUT_PAIRS for pair in combinations(names, 2))


def _mistakes(
    scenes: Sequence[Scene], verdicts: Sequence[Sequence[Verdict]], counted: list[list[bool]]
) -> list[tuple[str, str, int]]:
    pairs = Counter(
        (item.category, verdict.category)
        for scene, seen, some in zip(scenes, verdicts, counted, strict=True)
        for item, verdict, ok in zip(scene.objects, seen, some, strict=True)
        if ok and item.category != verdict.category
    )
    return [(wanted, seen, times) for (wanted, seen), times in pairs.most_common(20)]
