"""Pictures of EmojiScenes' layouts by a pipeline, kept batch by batch, and their contact sheet."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hcma_fast.bench.quality.metrics.judge.model import Verdict
from hcma_fast.config import AlignmentSettings
from hcma_fast.layout import Layout
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.runtime.requests import call_arguments
from hcma_fast.train.data.emoji_scenes import Scene, Split

_GRID_COLUMNS, _GRID_CELLS, _GRID_SIDE = 8, 64, 192


def generate_images(
    pipe: HCMAPipeline,
    scenes: Sequence[Scene],
    split: Split,
    seed: int,
    batch_size: int,
    settings: AlignmentSettings,
    num_inference_steps: int,
    work: Path | None,
    progress: Callable[[int, int], None] | None,
    *,
    first: int = 0,
) -> NDArray[np.uint8]:
    """One image per scene, (B, H, W, 3) uint8; ``work`` keeps finished batches.

    ``first`` is the index in ``split`` of the first scene: it decides wordings and seeds.
    """
    key = {
        "weights": pipe.weights_hash,
        "engine": pipe.engine_hash,
        "backend": pipe.backend,
        "settings": settings.model_dump(),
        "split": split,
        "seed": seed,
        "batch": batch_size,
        "steps": num_inference_steps,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    parts = []
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        place = first + start
        kept = work / digest / f"{place:06d}-{len(batch)}.npz" if work else None
        images = _read(kept, len(batch)) if kept else None
        if images is None:
            output = pipe(
                # all wordings take their turn
                [s.captions[i % len(s.captions)] for i, s in enumerate(batch, place)],
                [scene_layout(s) for s in batch],
                seed=[seed + place + i for i in range(len(batch))],
                num_inference_steps=num_inference_steps,
                **call_arguments(settings),
            )
            images = np.stack([np.asarray(image) for image in output.images])
            if kept:
                _write(kept, images)
        parts.append(images)
        if progress is not None:
            progress(start + len(batch), len(scenes))
    return np.concatenate(parts)


def scene_layout(scene: Scene) -> Layout:
    """Its objects, named by their phrases."""
    return Layout([o.phrase for o in scene.objects], [o.box for o in scene.objects])


def _read(path: Path, count: int) -> NDArray[np.uint8] | None:
    """A kept batch, or None when there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images: NDArray[np.uint8] = file["images"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return images if len(images) == count else None


def _write(path: Path, images: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.savez_compressed(file, images=images)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save_grid(
    path: Path,
    images: NDArray[np.uint8],
    scenes: Sequence[Scene],
    verdicts: Sequence[Sequence[Verdict]],
) -> None:
    """Contact sheet of the first 64 images: boxes and what was asked for, green if recognised."""
    shown = min(len(images), _GRID_CELLS)
    columns = min(_GRID_COLUMNS, shown)
    sheet = Image.new("RGB", (columns * _GRID_SIDE, -(-shown // columns) * _GRID_SIDE))
    draw = ImageDraw.Draw(sheet)
    for index in range(shown):
        row, column = divmod(index, columns)
        left, top = column * _GRID_SIDE, row * _GRID_SIDE
        picture = Image.fromarray(images[index])
        sheet.paste(picture.resize((_GRID_SIDE, _GRID_SIDE), Image.Resampling.NEAREST), (left, top))
        for item, verdict in zip(scenes[index].objects, verdicts[index], strict=True):
            right = verdict.category == item.category
            colour = (0, 160, 0) if right else (220, 0, 0)
            x0, y0, x1, y1 = (round(v * (_GRID_SIDE - 1)) for v in item.box)
            draw.rectangle((left + x0, top + y0, left + x1, top + y1), outline=colour)
            label = item.category if right else f"{item.category}: {verdict.category}?"
            draw.text((left + x0 + 2, top + y0), label, fill=colour)
    partial = path.with_name(f".{path.name}.part")
    with partial.open("wb") as file:
        sheet.save(file, "PNG")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
