"""EmojiScenes rendered ahead: a scene takes milliseconds to draw, a training step wants dozens."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hcma_fast.errors import UsageError
from hcma_fast.files import make_folder, write_whole
from hcma_fast.train.data.editions import EDITIONS
from hcma_fast.train.data.emoji_scenes import FIRST, Edition, Split

_CHUNK = 500
_log = logging.getLogger("hcma_fast")


def draw_scenes(
    edition: Edition, split: Split, indices: Iterable[int], image_size: int
) -> NDArray[np.uint8]:
    """These scenes as (B, size, size, 3) uint8."""
    return np.stack(
        [
            np.asarray(edition.render(edition.sample(split, i, image_size), split, i, image_size))
            for i in indices
        ]
    )


def _render_chunk(job: tuple[int, Split, int, int, int]) -> NDArray[np.uint8]:
    number, split, start, stop, size = job
    return draw_scenes(EDITIONS[number], split, range(start, stop), size)


def rendered_scenes(
    folder: Path,
    split: Split,
    count: int,
    image_size: int | None = None,
    workers: int = 2,
    edition: Edition = FIRST,
) -> NDArray[np.uint8]:
    """Scenes 0 .. count-1 as a memory-mapped (count, size, size, 3) uint8 array, drawn once.

    Args:
        image_size: None for the edition's own.

    Raises:
        OutputError: the file cannot be written, or the disk is full.
    """
    image_size = image_size or edition.image_size
    prefix = "scenes" if edition is FIRST else f"scenes{edition.number}"
    path = folder / f"{prefix}-{split}-{count}-{image_size}.npy"
    if not path.exists():
        make_folder(folder)
        _log.info("Drawing %d scenes of the split %s, once for this folder.", count, split)
        jobs = [
            (edition.number, split, start, min(start + _CHUNK, count), image_size)
            for start in range(0, count, _CHUNK)
        ]
        shape = (count, image_size, image_size, 3)

        def write(file: BinaryIO) -> None:
            # not through a mapping: a full disk would end the process by a signal
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for chunk in pool.imap(_render_chunk, jobs):
                    file.write(chunk.tobytes())

        write_whole(path, write)
    loaded: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return loaded


def check_batch(batch: int, scenes: int) -> None:
    """A step's scenes are all different.

    Raises:
        UsageError: there are fewer than the batch takes.
    """
    if batch > scenes:
        raise UsageError(
            f"a batch takes more scenes than the {scenes} that there are",
            value=batch,
            remedy="Lower --batch or raise --scenes.",
        )
