"""The cache that the aligner is trained from: a header, label embeddings, and shards.

``cache.json`` says what the cache was made of and how; ``labels.safetensors`` holds an embedding
per label; ``shard-NNNNN.safetensors`` holds what :data:`SHARD_TENSORS` lists, for up to
``shard_size`` images each. Every file carries the header's digest, so that a file of another cache
is refused. Shards are memory-mapped: a batch reads its own rows only, and all processes of a
machine share the pages. Random rows of 64 KiB from the page cache, one thread of a busy machine:
42,000 rows/s from a mapped .npy file, 20,000 by indexing a mapped safetensors tensor in torch,
8,000 by safetensors' slices, 2,500 in order from a tar. The tensors here are indexed by numpy,
as the .npy file's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hcma_fast.errors import InputError
from hcma_fast.files import read_file
from hcma_fast.models.checkpoint.json_files import first_line
from hcma_fast.train.data.coco_records import BadRecord
from hcma_fast.train.data.views import Part, part_of

HEADER_FILE = "cache.json"
LABELS_FILE = "labels.safetensors"
_NOTES = "hcma_fast"
#: n images with V views, k captions and m boxes in all
SHARD_TENSORS = {
    "image_ids": "(n,) int64",
    "latents": "(n, V, 2, C, h, w) float16: VAE mean and standard deviation, not scaled",
    "caption_starts": "(n + 1,) int64, into captions",
    "captions": "(k, d) float32",
    "caption_flips": "(k,) bool: may the image be mirrored under this caption?",
    "box_starts": "(n + 1,) int64, into boxes and labels",
    "boxes": "(m, 4) float32, xyxy in [0, 1] of the view that is not mirrored",
    "labels": "(m,) int64, into the header's labels",
}


class CacheHeader(BaseModel):
    """What a cache was made of and how: two caches with equal headers are interchangeable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    preset: str
    vae_sha256: str = Field(description="of the VAE's encoder")
    text_sha256: str = Field(description="of the text encoder and the tokenizer")
    annotations_sha256: str = Field(description="of the instances and captions files")
    split: str
    image_count: int = Field(gt=0)
    image_size: int = Field(gt=0)
    crop: Literal["centre"] = "centre"
    min_area: float
    views: int = Field(ge=1, le=2, description="2: as it is, and mirrored")
    latent_shape: tuple[int, int, int]
    latent_dtype: Literal["float16"] = "float16"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    scaling_factor: float
    text_width: int
    labels: tuple[str, ...]
    shard_size: int = Field(gt=0)
    skip_bad: bool = False

    @property
    def digest(self) -> str:
        """sha256 of the header, as every shard carries it."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def shard_count(self) -> int:
        """Shards of a whole cache."""
        return -(-self.image_count // self.shard_size)


class CacheNotes(BaseModel):
    """What a file of the cache says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    header: str = Field(description="digest of the header that it belongs to")
    cut_captions: int = Field(0, description="longer than the text encoder takes")
    skipped: tuple[BadRecord, ...] = ()
    changes: dict[str, int] = Field({}, description="images that were oriented or scaled")


def shard_file(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def read_header(folder: Path) -> CacheHeader:
    """Read ``cache.json``.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / HEADER_FILE
    try:
        return CacheHeader.model_validate_json(read_file(path, "the cache's header"))
    except (InputError, ValidationError) as error:
        raise InputError(
            f"this is no cache: {first_line(error)}",
            value=str(path),
            remedy="Make one with hcma-fast train cache.",
        ) from error


def pack(tensors: dict[str, Tensor], notes: CacheNotes) -> bytes:
    """Content of a file of the cache; the same for the same input."""
    # one entry: safetensors writes several in a random order
    return save(tensors, {_NOTES: notes.model_dump_json()})


def read_tensors(path: Path, digest: str) -> tuple[dict[str, Tensor], CacheNotes]:
    """Memory-mapped tensors of a file of the cache, and the notes with them.

    Raises:
        InputError: it is missing, damaged, or of a cache with another header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = CacheNotes.model_validate_json((file.metadata() or {}).get(_NOTES, ""))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValidationError) as error:
        raise InputError(
            f"a file of the cache cannot be read: {first_line(error)}",
            value=str(path),
            remedy="Run the same hcma-fast train cache again: it makes what is missing. Delete a "
            "damaged file first.",
        ) from error
    if notes.header != digest:
        raise InputError(
            "this file is of another cache: encoder, crop or annotations differ",
            value=str(path),
            remedy="Make the cache again, in an empty folder.",
        )
    return found, notes


@dataclass(frozen=True)
class Batch:
    """B images; M is the largest number of boxes among them, at least 1."""

    image_ids: Tensor
    """(B,) int64"""
    mean: Tensor
    """(B, C, h, w) float16, not scaled"""
    std: Tensor
    """(B, C, h, w) float16"""
    caption: Tensor
    """(B, d) float32"""
    caption_index: Tensor
    """(B,) int64, among all captions of the cache"""
    boxes: Tensor
    """(B, M, 4) float32"""
    mask: Tensor
    """(B, M) float32"""
    labels: Tensor
    """(B, M) int64, 0 where there is no box"""

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return Batch(*(v.to(device, non_blocking=True) for v in self.__dict__.values()))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory; the loader calls it."""
        return Batch(*(value.pin_memory() for value in self.__dict__.values()))


class LatentCache:
    """Images by their index in the cache, 0 to ``len - 1``; all but the latents is in memory."""

    def __init__(self, folder: Path) -> None:
        """Open the cache.

        Raises:
            InputError: it is no cache, not finished, empty, damaged, or mixed with another one.
        """
        self.folder, self.header = folder, read_header(folder)
        digest = self.header.digest
        missing = [
            name
            for name in (LABELS_FILE, *map(shard_file, range(self.header.shard_count)))
            if not (folder / name).is_file()
        ]
        if missing:
            raise InputError(
                f"the cache is not finished: {len(missing)} files are missing",
                value=str(folder / missing[0]),
                remedy="Run the same hcma-fast train cache again: it goes on where it stopped.",
            )
        self.label_table = read_tensors(folder / LABELS_FILE, digest)[0]["labels"]
        shards = [
            _checked(folder / shard_file(index), digest, self.header)
            for index in range(self.header.shard_count)
        ]
        # views of the mapped files: as arrays, since numpy takes a row twice as fast as torch
        self._latents = [shard["latents"].numpy() for shard in shards]
        counts = [len(shard["image_ids"]) for shard in shards]
        self._shard_of = np.repeat(np.arange(len(shards)), counts)
        self._row_of = np.concatenate([np.arange(count) for count in counts])
        self.image_ids = _joined(shards, "image_ids")
        self._captions = _joined(shards, "captions")
        self._caption_flips = _joined(shards, "caption_flips")
        self._boxes, self._labels = _joined(shards, "boxes"), _joined(shards, "labels")
        self._caption_starts = _joined_starts(shards, "caption_starts")
        self._box_starts = _joined_starts(shards, "box_starts")

        if not len(self):
            raise InputError(
                "the cache has no image: none could be used",
                value=str(folder),
                remedy="Make another one; hcma-fast train cache says what was wrong with each.",
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def caption_counts(self) -> NDArray[np.int64]:
        """Captions of each image, (images,)."""
        return np.diff(self._caption_starts)

    def indices_of(self, part: Part) -> NDArray[np.int64]:
        """Indices of the images of a part of the split by image id.

        Raises:
            InputError: the part is empty.
        """
        chosen = [i for i, number in enumerate(self.image_ids.tolist()) if part_of(number) == part]
        if not chosen:
            raise InputError(
                f"the {part} part of this cache is empty ({len(self)} images)",
                value=str(self.folder),
                remedy="The parts are split 80/20 by image id: give more images.",
            )
        return np.array(chosen, dtype=np.int64)

    def batch(
        self,
        indices: NDArray[np.int64],
        caption_draws: NDArray[np.float64] | None = None,
        flip_draws: NDArray[np.float64] | None = None,
    ) -> Batch:
        """The images at ``indices`` (B,).

        Args:
            caption_draws: (B,) in [0, 1): which caption; default the first of each image.
            flip_draws: (B,) in [0, 1): mirrored below 0.5, where the cache has that view and the
                drawn caption says neither left nor right; default not mirrored.
        """
        first = self._caption_starts[indices]
        count = self._caption_starts[indices + 1] - first
        chosen = first if caption_draws is None else first + (caption_draws * count).astype(int)
        flips = np.zeros(len(indices), dtype=bool)
        if flip_draws is not None and self.header.views > 1:
            flips = (flip_draws < 0.5) & self._caption_flips[chosen]
        latents = np.empty((len(indices), 2, *self.header.latent_shape), dtype=np.float16)
        for position, (index, flip) in enumerate(zip(indices, flips, strict=True)):
            latents[position] = self._latents[self._shard_of[index]][self._row_of[index], int(flip)]

        starts, ends = self._box_starts[indices], self._box_starts[indices + 1]
        most = max(1, int((ends - starts).max()))
        boxes = np.zeros((len(indices), most, 4), dtype=np.float32)
        labels = np.zeros((len(indices), most), dtype=np.int64)
        mask = np.arange(most) < (ends - starts)[:, None]
        places = (starts[:, None] + np.arange(most))[mask]
        boxes[mask], labels[mask] = self._boxes[places], self._labels[places]
        x0, y0, x1, y1 = boxes[mirrored := flips[:, None] & mask].T
        boxes[mirrored] = np.stack([1 - x1, y0, 1 - x0, y1], axis=1)
        return Batch(
            image_ids=torch.from_numpy(self.image_ids[indices]),
            mean=torch.from_numpy(latents[:, 0]),
            std=torch.from_numpy(latents[:, 1]),
            caption=torch.from_numpy(self._captions[chosen]),
            caption_index=torch.from_numpy(chosen),
            boxes=torch.from_numpy(boxes),
            mask=torch.from_numpy(mask.astype(np.float32)),
            labels=torch.from_numpy(labels),
        )


def _checked(path: Path, digest: str, header: CacheHeader) -> dict[str, Tensor]:
    found, _ = read_tensors(path, digest)
    shape = (header.views, 2, *header.latent_shape)
    if set(found) != set(SHARD_TENSORS) or tuple(found["latents"].shape[1:]) != shape:
        raise InputError(
            "this shard does not hold what its header says",
            value=str(path),
            remedy="Delete it, and run the same hcma-fast train cache again.",
        )
    return found


def _joined(shards: list[dict[str, Tensor]], name: str) -> NDArray[Any]:
    return torch.cat([shard[name] for shard in shards]).numpy()


def _joined_starts(shards: list[dict[str, Tensor]], name: str) -> NDArray[np.int64]:
    """Starts into the joined arrays, (images + 1,)."""
    counts = torch.cat([shard[name].diff() for shard in shards]).numpy()
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
