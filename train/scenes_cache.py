"""EmojiScenes rendered ahead: a scene takes milliseconds to draw, a training step wants dozens."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcma_fast.train.emoji_scenes import Split, render_scene, sample_scene

_CHUNK = 500


def _render_chunk(job: tuple[Split, int, int, int]) -> NDArray[np.uint8]:
    split, start, stop, size = job
    return np.stack(
        [
            np.asarray(render_scene(sample_scene(split, i, size), split, i, size))
            for i in range(start, stop)
        ]
    )


def rendered_scenes(
    folder: Path, split: Split, count: int, image_size: int = 64, workers: int = 2
) -> NDArray[np.uint8]:
    """Scenes 0 .. count-1 as a memory-mapped (count, size, size, 3) uint8 array, drawn once."""
    path = folder / f"scenes-{split}-{count}-{image_size}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [
            (split, start, min(start + _CHUNK, count), image_size)
            for start in range(0, count, _CHUNK)
        ]
        partial = path.with_suffix(".part")
        array = np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.uint8, shape=(count, image_size, image_size, 3)
        )
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for (_, start, stop, _), chunk in zip(
                jobs, pool.imap(_render_chunk, jobs), strict=True
            ):
                array[start:stop] = chunk
        array.flush()
        partial.replace(path)
    loaded: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return loaded
