"""Reader for data in COCO's annotation format: EmojiScenes, and COCO 2014 unchanged.

Everything is checked while reading, so that training never meets a bad record. A bad image stops
the reading, or is left out and listed where that is asked for; a file that contradicts itself
(ids that occur twice, annotations of unknown images) always stops it.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcma_fast.errors import InputError
from hcma_fast.layout import Layout


@dataclass(frozen=True)
class CocoExample:
    """One image: its file and size in pixels, at least one caption, and its largest 30 boxes."""

    image_id: int
    path: Path
    width: int
    height: int
    captions: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class BadImage:
    """An image that was left out: its id, the file that is to blame, and why."""

    image_id: int
    path: str
    why: str


class _Record(BaseModel):
    # COCO's records hold more: licences, segmentations, URLs
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Numbered(_Record):
    id: int


class _Image(_Numbered):
    file_name: str = Field(pattern=r"^[^/\\]+$")
    width: int = Field(gt=0)
    height: int = Field(gt=0)


class _Category(_Numbered):
    name: str


class _Instance(_Numbered):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0


class _Caption(_Numbered):
    image_id: int
    caption: str


class _Instances(_Record):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Instance]


class _Captions(_Record):
    annotations: list[_Caption]


_Document = TypeVar("_Document", _Instances, _Captions)


def annotation_files(root: str | Path, split: str) -> tuple[Path, Path]:
    """The instances and captions of ``split``, where COCO has them."""
    folder = Path(root) / "annotations"
    return folder / f"instances_{split}.json", folder / f"captions_{split}.json"


def read_split(
    root: str | Path, split: str, *, skipped: list[BadImage] | None = None
) -> list[CocoExample]:
    """``root/split/*`` and ``root/annotations/{instances,captions}_split.json``; see
    :func:`read_coco`.

    Raises:
        InputError: what :func:`read_coco` raises, or there is no such split; names those there are.
    """
    instances, captions = annotation_files(root, split)
    there = sorted(
        path.stem.removeprefix("instances_") for path in instances.parent.glob("instances_*.json")
    )
    if there and split not in there:
        raise InputError(
            f"there is no split {split} here",
            value=str(instances),
            remedy=f"There are annotations of {', '.join(there)}: give one of them, or other data.",
        )
    return read_coco(Path(root) / split, instances, captions, skipped=skipped)


def read_coco(
    images: str | Path,
    instances: str | Path,
    captions: str | Path,
    *,
    skipped: list[BadImage] | None = None,
) -> list[CocoExample]:
    """Read a split, in the order of its image list.

    Args:
        images: the folder of the image files, each of which must exist; none is opened.
        instances: ``instances_*.json``; crowds are left out, boxes are clipped to the image.
        captions: ``captions_*.json`` of the same images.
        skipped: takes the images without caption, without file or with a malformed box, which
            are errors otherwise.

    Raises:
        InputError: names the file: it is missing or not in COCO's format, it lists no image, ids
            occur twice, an annotation is of an unknown image or category, an image has no caption
            or no file.
    """
    images, instances, captions = Path(images), Path(instances), Path(captions)
    boxes, texts = _read(instances, _Instances), _read(captions, _Captions)
    if not boxes.images:
        _fail("this split lists no image", instances)
    _check_unique("image", instances, boxes.images)
    _check_unique("category", instances, boxes.categories)
    _check_unique("annotation", instances, boxes.annotations)
    _check_unique("caption", captions, texts.annotations)
    try:
        files = set(os.listdir(images))
    except OSError as error:
        _fail(f"cannot read the folder of images: {error.strerror}", images, error)

    known = {image.id for image in boxes.images}
    boxes_of: defaultdict[int, list[_Instance]] = defaultdict(list)
    for box in boxes.annotations:
        if box.image_id not in known:
            _fail(f"annotation {box.id} is of image {box.image_id}, which is not listed", instances)
        boxes_of[box.image_id].append(box)
    for text in texts.annotations:
        if text.image_id not in known:
            _fail(f"caption {text.id} is of image {text.image_id}, which is not listed", captions)
    texts_of = _by_image(texts)

    names = {category.id: category.name for category in boxes.categories}

    def example(image: _Image) -> CocoExample:
        path, lines = images / image.file_name, texts_of.get(image.id, ())
        if not lines:
            _fail(f"image {image.id} has no caption", captions)
        if image.file_name not in files:
            _fail(f"the file of image {image.id} is missing", path)
        found = (box.model_dump() for box in boxes_of[image.id])
        try:
            layout = Layout.from_coco(found, names, image.width, image.height)
        except InputError as error:
            _fail(f"image {image.id}: {error.what} (got {error.value!r})", instances, error)
        return CocoExample(image.id, path, image.width, image.height, lines, layout)

    examples = []
    for image in boxes.images:
        try:
            examples.append(example(image))
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(BadImage(image.id, str(error.value), error.what))
    if not examples:
        _fail("no image of this split can be used", instances)
    return examples


def read_categories(instances: str | Path) -> dict[int, str]:
    """The names of ``instances_*.json``'s categories by their ids.

    Raises:
        InputError: names the file: it is missing, not in COCO's format, or an id occurs twice.
    """
    path = Path(instances)
    found = _read(path, _Instances).categories
    _check_unique("category", path, found)
    return {category.id: category.name for category in found}


def read_captions(root: str | Path, split: str) -> dict[int, tuple[str, ...]]:
    """The captions that :func:`read_split` gives, by image id; no other file is read.

    Raises:
        InputError: names the file: it is missing or not in COCO's format.
    """
    return _by_image(_read(annotation_files(root, split)[1], _Captions))


def _by_image(texts: _Captions) -> dict[int, tuple[str, ...]]:
    """In the file's order, without blank ones."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for text in texts.annotations:
        if line := text.caption.strip():
            found[text.image_id].append(line)
    return {number: tuple(lines) for number, lines in found.items()}


def open_image(example: CocoExample) -> Image.Image:
    """The decoded image, RGB.

    Raises:
        InputError: names the file: it is missing, truncated, no image, or of another size than its
            annotation says.
    """
    try:
        with Image.open(example.path) as file:
            image = file.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        _fail(f"cannot read image {example.image_id}: {error}", example.path, error)
    if image.size != (example.width, example.height):
        _fail(
            f"image {example.image_id} is of {image.width} x {image.height} pixels, its annotation "
            f"of {example.width} x {example.height}",
            example.path,
        )
    return image


def _read(path: Path, kind: type[_Document]) -> _Document:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        _fail(f"cannot read the annotations: {error.strerror}", path, error)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        _fail(f"not in COCO's format: {where}: {first['msg']}", path, error)


def _check_unique(kind: str, path: Path, records: Sequence[_Numbered]) -> None:
    for number, count in Counter(record.id for record in records).items():
        if count > 1:
            _fail(f"{kind} id {number} occurs {count} times", path)


def _fail(what: str, path: Path, cause: Exception | None = None) -> NoReturn:
    remedy = "Give the images, instances and captions of one split, whole and unchanged."
    raise InputError(what, value=str(path), remedy=remedy) from cause
