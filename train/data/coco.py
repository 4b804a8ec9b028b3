"""Reader for data in COCO's annotation format: EmojiScenes, and COCO 2014 unchanged.

Everything is checked while reading, so that training never meets a bad record. A bad record stops
the reading, or is left out and listed where that is asked for; a file that contradicts itself
(ids that occur twice, annotations of unknown images) always stops it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hcma_fast.errors import InputError
from hcma_fast.layout import Layout, is_empty
from hcma_fast.train.data.coco_records import (
    BadRecord,
    CaptionRecord,
    CaptionsFile,
    CategoryRecord,
    ImageRecord,
    InstanceRecord,
    InstancesFile,
    NumberedRecord,
    fail,
    read_annotations,
    usable,
)
from hcma_fast.train.data.image_files import open_image_file
from hcma_fast.train.data.image_folder import ImageFolder


@dataclass(frozen=True)
class CocoExample:
    """One image: its file and size in pixels, at least one caption, and its largest 30 boxes."""

    image_id: int
    path: Path
    width: int
    height: int
    captions: tuple[str, ...]
    layout: Layout
    empty_boxes: int = 0
    """boxes without area inside the image, which the layout does not have"""


def annotation_files(root: str | Path, split: str) -> tuple[Path, Path]:
    """The instances and captions of ``split``, where COCO has them."""
    folder = Path(root) / "annotations"
    return folder / f"instances_{split}.json", folder / f"captions_{split}.json"


def read_split(
    root: str | Path,
    split: str,
    *,
    skipped: list[BadRecord] | None = None,
    image_root: Path | None = None,
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
    return read_coco(
        Path(root) / split, instances, captions, skipped=skipped, image_root=image_root
    )


def read_coco(
    images: str | Path,
    instances: str | Path,
    captions: str | Path,
    *,
    skipped: list[BadRecord] | None = None,
    image_root: Path | None = None,
) -> list[CocoExample]:
    """Read a split, in the order of its image list.

    Args:
        images: the folder of the image files, each of which must exist; none is opened.
        instances: ``instances_*.json``; crowds are left out, boxes are clipped to the image.
        captions: ``captions_*.json`` of the same images.
        skipped: takes bad records, and images without caption or file, which are errors
            otherwise. An image stays without its bad boxes and captions.
        image_root: file names may be absolute or have "..", as long as they lie in this folder.

    Raises:
        InputError: names the file: it is missing or not in COCO's format, it lists no image, a
            record is malformed, ids occur twice, an annotation is of an unknown image or
            category, an image has no caption or no file.
    """
    instances, captions = Path(instances), Path(captions)
    bad: list[BadRecord] = []
    boxes = read_annotations(instances, InstancesFile)
    if not boxes.images:
        fail("this split lists no image", instances)
    listed = usable("image", ImageRecord, boxes.images, instances, bad)
    known = {image.id for image in listed} | {record.id for record in bad}
    _check_unique("image", instances, listed)
    names = _names(boxes, instances, bad)
    boxes_of = _boxes_by_image(boxes, names, known, instances, bad)
    texts_of = _texts_by_image(read_annotations(captions, CaptionsFile), captions, bad, known)
    folder = ImageFolder(Path(images), image_root)

    def example(image: ImageRecord) -> CocoExample:
        lines = texts_of.get(image.id, ())
        if not lines:
            fail(f"image {image.id} has no caption", captions)
        try:
            path = folder.find(image.file_name)
        except InputError as error:
            fail(f"image {image.id}: {error.what}: {image.file_name!r}", instances, error)
        if path is None:
            fail(f"the file of image {image.id} is missing", folder.folder / image.file_name)
        records = boxes_of[image.id]
        layout = Layout.from_coco(
            (record.model_dump() for record in records), names, image.width, image.height
        )
        empty = sum(_leaves_nothing(record, image) for record in records)
        return CocoExample(image.id, path, image.width, image.height, lines, layout, empty)

    examples = []
    for image in listed:
        try:
            examples.append(example(image))
        except InputError as error:
            bad.append(BadRecord("image", image.id, str(error.value), error.what))
    if bad and skipped is None:
        _refuse(bad)
    if skipped is not None:
        skipped += bad
    if not examples:
        fail(f"no image of this split can be used, the first one because: {bad[0].why}", instances)
    return examples


def read_categories(instances: str | Path, *, skip_bad: bool = False) -> dict[int, str]:
    """The names of ``instances_*.json``'s categories by their ids.

    Raises:
        InputError: names the file: it is missing or not in COCO's format, an id occurs twice, or a
            category is malformed and not skipped.
    """
    path = Path(instances)
    bad: list[BadRecord] = []
    names = _names(read_annotations(path, InstancesFile), path, bad)
    if bad and not skip_bad:
        _refuse(bad)
    return names


def read_captions(
    root: str | Path, split: str, *, skip_bad: bool = False
) -> dict[int, tuple[str, ...]]:
    """The captions that :func:`read_split` gives, by image id; no other file is read.

    Raises:
        InputError: names the file: it is missing or not in COCO's format, or a caption is
            malformed and not skipped.
    """
    path = annotation_files(root, split)[1]
    bad: list[BadRecord] = []
    texts = _texts_by_image(read_annotations(path, CaptionsFile), path, bad)
    if bad and not skip_bad:
        _refuse(bad)
    return texts


def _names(boxes: InstancesFile, path: Path, bad: list[BadRecord]) -> dict[int, str]:
    """Category names by id, those that a layout can have."""
    categories = usable("category", CategoryRecord, boxes.categories, path, bad)
    _check_unique("category", path, categories)
    names = {}
    for category in categories:
        try:
            Layout([category.name], [(0, 0, 1, 1)])
            names[category.id] = category.name
        except InputError as error:
            why = f"category {category.id}: its name cannot be a phrase: {error.what}"
            bad.append(BadRecord("category", category.id, str(path), why))
    return names


def _boxes_by_image(
    boxes: InstancesFile,
    names: dict[int, str],
    known: set[int | None],
    path: Path,
    bad: list[BadRecord],
) -> defaultdict[int, list[InstanceRecord]]:
    """Without crowds.

    Args:
        known: ids of images, bad ones included; None where one has no readable id.
    """
    records = usable("annotation", InstanceRecord, boxes.annotations, path, bad)
    _check_unique("annotation", path, records)
    by_image: defaultdict[int, list[InstanceRecord]] = defaultdict(list)
    for record in records:
        if record.image_id not in known:
            why = f"annotation {record.id} is of image {record.image_id}, which is not listed"
            if None not in known:
                fail(why, path)
            bad.append(BadRecord("annotation", record.id, str(path), why))
        elif record.iscrowd:
            continue
        elif record.category_id not in names:
            why = f"annotation {record.id}: category {record.category_id} cannot be used"
            bad.append(BadRecord("annotation", record.id, str(path), why))
        else:
            by_image[record.image_id].append(record)
    return by_image


def _texts_by_image(
    texts: CaptionsFile, path: Path, bad: list[BadRecord], known: set[int | None] | None = None
) -> dict[int, tuple[str, ...]]:
    """In the file's order, without blank ones."""
    records = usable("caption", CaptionRecord, texts.annotations, path, bad)
    _check_unique("caption", path, records)
    by_image: defaultdict[int, list[str]] = defaultdict(list)
    for record in records:
        if known is not None and record.image_id not in known:
            why = f"caption {record.id} is of image {record.image_id}, which is not listed"
            if None not in known:
                fail(why, path)
            bad.append(BadRecord("caption", record.id, str(path), why))
        elif line := record.caption.strip():
            by_image[record.image_id].append(line)
    return {number: tuple(lines) for number, lines in by_image.items()}


def _leaves_nothing(record: InstanceRecord, image: ImageRecord) -> bool:
    """As Layout.from_coco clips it."""
    x, y, width, height = record.bbox
    box = (
        max(x / image.width, 0.0),
        max(y / image.height, 0.0),
        min((x + width) / image.width, 1.0),
        min((y + height) / image.height, 1.0),
    )
    return is_empty(box)


def open_image(example: CocoExample) -> Image.Image:
    """The decoded image, RGB and upright; see :func:`open_image_file`.

    Raises:
        InputError: names the file: it is missing, damaged, no image, too large, or of another size
            than its annotation says.
    """
    what, size = f"image {example.image_id}", (example.width, example.height)
    return open_image_file(example.path, what, size=size).image


def _check_unique(kind: str, path: Path, records: Sequence[NumberedRecord]) -> None:
    for number, count in Counter(record.id for record in records).items():
        if count > 1:
            fail(f"{kind} id {number} occurs {count} times", path)


def _refuse(bad: Sequence[BadRecord]) -> None:
    """Raise InputError about the first bad record, and say how many there are."""
    more = f"; {len(bad) - 1} more cannot be used" if len(bad) > 1 else ""
    raise InputError(
        f"{bad[0].why}{more}",
        value=bad[0].path,
        remedy="Mend the annotations or files, or leave such records out with --skip-bad.",
    )
