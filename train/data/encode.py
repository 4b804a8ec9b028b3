"""Make the cache of ``latent_cache``: images to VAE posteriors, texts to embeddings.

Both views of an image are encoded, as it is and mirrored: mirroring a latent is not the latent of
the mirrored image (docs/train.md has the error). A shard is written whole or not at all, so a run
that was killed goes on with the first one that is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hcma_fast.errors import HcmaError, InputError
from hcma_fast.files import make_folder, write_whole
from hcma_fast.train.data.coco import (
    CocoExample,
    annotation_files,
    read_split,
)
from hcma_fast.train.data.coco_records import BadRecord
from hcma_fast.train.data.encoders import Encoders
from hcma_fast.train.data.image_files import open_image_file
from hcma_fast.train.data.latent_cache import (
    HEADER_FILE,
    LABELS_FILE,
    CacheHeader,
    CacheNotes,
    pack,
    read_header,
    read_tensors,
    shard_file,
)
from hcma_fast.train.data.views import MIN_AREA, crop_image, crop_layout, mentions_side


@dataclass
class CacheReport:
    """What :func:`make_cache` did."""

    images: int = 0
    """in the cache, those of earlier runs included"""
    encoded: int = 0
    """by this run"""
    boxes: int = 0
    captions: int = 0
    cut_captions: int = 0
    """captions of more tokens than the text encoder takes: their end is lost"""
    empty_boxes: int = 0
    """boxes of the annotations without area inside their image"""
    changes: Counter[str] = field(default_factory=Counter)
    """how many images were oriented or scaled when they were opened"""
    skipped: list[BadRecord] = field(default_factory=list)


def make_cache(
    data: Path,
    split: str,
    encoders: Encoders,
    out: Path,
    *,
    image_size: int | None = None,
    flip: bool = True,
    skip_bad: bool = False,
    shard_size: int = 512,
    batch_size: int = 16,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    image_root: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CacheReport:
    """Encode a split in COCO's format into the folder ``out``, or finish what lies there.

    Args:
        image_size: side of the crops in pixels; default what the model was trained at.
        flip: encode the mirrored images too.
        skip_bad: leave out records and images that cannot be used, and list them, instead of
            stopping.
        workers: processes that decode images; 0 for this one.
        share: (i, n): make shards i, i + n, i + 2 n ...; n runs with the same ``out``, each on a
            device of its own, make one cache.
        image_root: file names may be absolute or have "..", as long as they lie in this folder.
        progress: called with images done and images to do, both of this run alone: neither other
            shares count nor shards that were there, so a rate is that of encoding.

    Raises:
        InputError: the split is not in COCO's format or empty, an image cannot be read, no image
            can be used, or ``out`` holds the cache of another model, split or crop; names the file.
        OutputError: ``out`` cannot be written, or the disk is full.
    """
    early: list[BadRecord] = []
    skipped = early if skip_bad else None
    examples = read_split(data, split, skipped=skipped, image_root=image_root)
    header = _header(data, split, encoders, examples, image_size, flip, skip_bad, shard_size)
    make_folder(out)
    _claim(out, header)
    _write_labels(out / LABELS_FILE, header, encoders)

    shards = {
        index: examples[index * shard_size : (index + 1) * shard_size]
        for index in range(share[0], header.shard_count, share[1])
    }
    missing = {index for index in shards if not (out / shard_file(index)).is_file()}
    total = sum(len(shards[index]) for index in missing)
    report, seen = CacheReport(skipped=early), 0
    report.empty_boxes = sum(example.empty_boxes for some in shards.values() for example in some)
    progress(0, total)
    for index, some in shards.items():
        path, there = out / shard_file(index), report.images
        if index in missing:
            crops = DataLoader(
                _Crops(some, header.image_size),
                batch_size=batch_size,
                num_workers=workers,
                collate_fn=list,
            )

            def advance(count: int, before: int = seen) -> None:
                progress(before + count, total)

            _write_shard(path, some, crops, header, encoders, advance)
            seen += len(some)
        _count(report, path, header)
        if index in missing:
            # without those that were skipped
            report.encoded += report.images - there
    if shards and not report.images and share[1] == 1:
        raise InputError(
            f"no image of this split can be used, the first one because: {report.skipped[0].why}",
            value=str(data),
            remedy="Mend the images, and make the cache in an empty folder.",
        )
    return report


def hash_annotations(data: Path, split: str) -> str:
    """sha256 of the instances and captions files, as a cache's header has it."""
    digest = hashlib.sha256()
    for path in annotation_files(data, split):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _header(
    data: Path,
    split: str,
    encoders: Encoders,
    examples: list[CocoExample],
    image_size: int | None,
    flip: bool,
    skip_bad: bool,
    shard_size: int,
) -> CacheHeader:
    size = image_size or encoders.image_size
    if size % encoders.factor:
        raise InputError(
            f"the image size must be a multiple of the VAE's factor, {encoders.factor}",
            value=size,
            remedy=f"The model was trained at {encoders.image_size}.",
        )
    side = size // encoders.factor
    return CacheHeader(
        preset=encoders.preset,
        vae_sha256=encoders.vae_sha256,
        text_sha256=encoders.text_sha256,
        annotations_sha256=hash_annotations(data, split),
        split=split,
        image_count=len(examples),
        image_size=size,
        min_area=MIN_AREA,
        views=2 if flip else 1,
        latent_shape=(int(encoders.vae.config.latent_channels), side, side),
        compute_dtype=encoders.dtype,
        scaling_factor=float(encoders.vae.config.scaling_factor),
        text_width=int(encoders.text_encoder.config.hidden_size),
        labels=tuple(sorted({phrase for e in examples for phrase in e.layout.phrases})),
        shard_size=shard_size,
        skip_bad=skip_bad,
    )


def _claim(out: Path, header: CacheHeader) -> None:
    """Write the header, or compare it with the one that is there."""
    path = out / HEADER_FILE
    if not path.exists():
        content = json.dumps(header.model_dump(mode="json"), indent=2) + "\n"
        write_whole(path, lambda file: file.write(content.encode()))
        return
    there = read_header(out)
    for name, wanted in header.model_dump().items():
        found = getattr(there, name)
        if found != wanted:
            raise InputError(
                f"this folder holds another cache: its {name} is {_short(found)}, not "
                f"{_short(wanted)}",
                value=str(path),
                remedy="Give an empty folder, or the options that this cache was begun with.",
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _write_labels(path: Path, header: CacheHeader, encoders: Encoders) -> None:
    if path.is_file():
        return
    # a split without any box still has a table, as no batch may index nothing
    table, cut = encoders.embed(header.labels or ("",))
    if cut:
        longest = max(header.labels, key=len)
        raise InputError(
            f"{cut} category names have more tokens than the text encoder takes",
            value=longest,
            remedy="Shorten them in the instances file.",
        )
    content = pack({"labels": table}, CacheNotes(header=header.digest))
    write_whole(path, lambda file: file.write(content))


@dataclass(frozen=True)
class _Crop:
    """(3, S, S) uint8, and what was done to the image to show it."""

    pixels: Tensor
    changes: tuple[str, ...]


class _Crops(Dataset[_Crop | BadRecord]):
    """The crop of each example, or what is wrong with it."""

    def __init__(self, examples: list[CocoExample], size: int) -> None:
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> _Crop | BadRecord:
        example = self.examples[index]
        what, size = f"image {example.image_id}", (example.width, example.height)
        try:
            opened = open_image_file(example.path, what, size=size)
        except InputError as error:
            # raised where it is seen: a worker's exception would lose its type on the way
            return BadRecord("image", example.image_id, str(error.value), error.what)
        pixels = np.array(crop_image(opened.image, self.size))
        return _Crop(torch.from_numpy(pixels).permute(2, 0, 1), opened.changes)


def _write_shard(
    path: Path,
    examples: list[CocoExample],
    crops: Iterable[list[_Crop | BadRecord]],
    header: CacheHeader,
    encoders: Encoders,
    advance: Callable[[int], None],
) -> None:
    kept: list[CocoExample] = []
    bad: list[BadRecord] = []
    changes: Counter[str] = Counter()
    latents: list[Tensor] = []
    seen = 0
    for some in crops:
        images = []
        for example, crop in zip(examples[seen : seen + len(some)], some, strict=True):
            if isinstance(crop, _Crop):
                images.append(crop.pixels)
                changes.update(crop.changes)
                kept.append(example)
            elif header.skip_bad:
                bad.append(crop)
            else:
                raise InputError(
                    crop.why,
                    value=crop.path,
                    remedy="Restore the file, or leave such images out with --skip-bad.",
                )
        if images:
            batch = torch.stack(images)
            views = [batch, batch.flip(-1)][: header.views]
            latents.append(torch.stack([encoders.posterior(view) for view in views], dim=1))
        seen += len(some)
        advance(seen)
    captions = [text for example in kept for text in example.captions]
    embedded, cut = encoders.embed(captions) if kept else (torch.zeros(0, header.text_width), 0)
    layouts = [crop_layout(e.layout, e.width, e.height, header.min_area) for e in kept]
    shape = (0, header.views, 2, *header.latent_shape)
    found = torch.cat(latents) if latents else torch.zeros(shape, dtype=torch.float16)
    _check_finite(found, kept)
    number = {label: index for index, label in enumerate(header.labels)}
    boxes = [box for layout in layouts for box in layout.boxes]
    tensors = {
        "image_ids": torch.tensor([e.image_id for e in kept], dtype=torch.int64),
        "latents": found,
        "caption_starts": _starts([len(e.captions) for e in kept]),
        "captions": embedded,
        "caption_flips": torch.tensor([not mentions_side(t) for t in captions], dtype=torch.bool),
        "box_starts": _starts([len(layout) for layout in layouts]),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(
            [number[phrase] for layout in layouts for phrase in layout.phrases], dtype=torch.int64
        ),
    }
    notes = CacheNotes(
        header=header.digest,
        cut_captions=cut,
        skipped=tuple(bad),
        changes=dict(sorted(changes.items())),
    )
    content = pack(tensors, notes)
    write_whole(path, lambda file: file.write(content))


def _check_finite(latents: Tensor, kept: list[CocoExample]) -> None:
    fine = torch.isfinite(latents).flatten(1).all(1)
    if not bool(fine.all()):
        first = kept[int((~fine).nonzero()[0])]
        raise HcmaError(
            f"the VAE gives values that are not finite for image {first.image_id}",
            value=str(first.path),
            remedy="Encode in float32: float16 overflows in some VAEs.",
        )


def _starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(counts, dtype=np.int64).tolist()], dtype=torch.int64)


def _count(report: CacheReport, path: Path, header: CacheHeader) -> None:
    found, notes = read_tensors(path, header.digest)
    report.images += len(found["image_ids"])
    report.captions += len(found["captions"])
    report.boxes += len(found["boxes"])
    report.cut_captions += notes.cut_captions
    report.skipped += notes.skipped
    report.changes.update(notes.changes)
