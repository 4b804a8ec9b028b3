"""What an evaluation runs over: captions, layouts and, where there are any, real images."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from hcma_fast.errors import HcmaError, InputError
from hcma_fast.files import is_file, parse_json, read_text
from hcma_fast.layout import Layout
from hcma_fast.train.data.coco import read_coco
from hcma_fast.train.data.coco_records import BadRecord
from hcma_fast.train.data.emoji_scenes import CATEGORIES, Split, render_scene, sample_scene
from hcma_fast.train.data.image_files import open_image_file
from hcma_fast.train.data.image_folder import ImageFolder
from hcma_fast.train.data.views import crop_image

_NAME = re.compile(r"\w[\w.-]{0,99}")
_PLURALS = {category.name: category.plural for category in CATEGORIES}
COCO_COUNT = 30_000
"""Images of the paper's COCO 2014 protocol (section 4.1)"""


class EvalItem(BaseModel):
    """One image to make, and what it is compared with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """a file name without suffix"""
    prompt: str
    layout: Layout
    negative_prompt: str = ""
    mentions: tuple[str, ...] | None = None
    """how the prompt words each phrase, for methods that look for them there"""
    image: Path | None = None
    """the real image"""
    scene: tuple[Split, int] | None = None
    """of EmojiScenes: its render is the real image"""
    image_size: tuple[int, int] | None = None
    """annotated width and height of the real image's file, where there is an annotation"""
    crop: bool = False
    """the real image is the square in the middle of the file's"""

    @property
    def has_real(self) -> bool:
        """Is there a real image?"""
        return self.image is not None or self.scene is not None

    def real_image(
        self, width: int, height: int, *, resize: bool, changes: Counter[str] | None = None
    ) -> Image.Image:
        """The real image, RGB and upright; see :func:`open_image_file`.

        Args:
            resize: scale one of another size, so that the boxes' shares still hold; else refuse it.
                One that is cropped is scaled anyway.
            changes: counts what was done to the file's image to show it.

        Raises:
            InputError: it cannot be read, or has another size.
        """
        if self.scene is not None:
            return render_scene(sample_scene(*self.scene), *self.scene, width)
        opened = open_image_file(
            Path(self.image or ""),
            f"the real image of {self.id}",
            size=self.image_size,
            remedy="Check the file, or leave out metrics that need real images.",
        )
        picture = opened.image
        if changes is not None:
            changes.update(opened.changes)
        if self.crop and width == height:
            return crop_image(picture, width)
        if picture.size != (width, height):
            if self.crop or not resize:
                raise InputError(
                    f"the real image of {self.id} has another size than {width} x {height}",
                    value=picture.size,
                    remedy="Scale them all the same way, or use --resize-real.",
                )
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        return picture


class _Line(BaseModel):
    """A line of the manifest; types are not converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str
    prompt: str
    phrases: list[str] = []
    boxes: list[list[float]] = []
    negative_prompt: str = ""
    mentions: list[str] | None = None
    image: str | None = None


_REMEDY = (
    'A line reads {"id": "1", "prompt": "a dog", "phrases": ["dog"], "boxes": '
    "[[0.1, 0.1, 0.5, 0.9]]}, and may have mentions, negative_prompt and image."
)


def read_items(path: Path, *, image_root: Path | None = None) -> list[EvalItem]:
    """The lines of a JSONL manifest; an image's path is relative to the manifest.

    Args:
        image_root: such paths may be absolute or have "..", as long as they lie in this folder.

    Raises:
        InputError: it cannot be read, a line is wrong, an id is missing, twice there or no file
            name, an image is missing or outside, or some lines have one and others not.
    """
    text = read_text(path, "the manifest", limit=2**30)
    folder = ImageFolder(path.parent, image_root)
    items = [
        _parse(line, f"line {number}", folder)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not items:
        raise InputError("the manifest has no lines", value=str(path), remedy=_REMEDY)
    check_items(items)
    return items


def _parse(line: str, where: str, folder: ImageFolder) -> EvalItem:
    try:
        data = parse_json(line, "a line")
    except HcmaError as error:
        raise error.at(where) from error
    if isinstance(data, dict):
        # a null is a missing value of pandas
        data = {key: value for key, value in data.items() if value is not None}
        if isinstance(data.get("id"), int) and not isinstance(data["id"], bool):
            data["id"] = str(data["id"])
    try:
        row = _Line.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{where}: {place + ': ' if place else ''}{first['msg']}",
            value=line[:80],
            remedy=_REMEDY,
        ) from error
    try:
        layout = Layout(row.phrases, row.boxes)
    except HcmaError as error:
        raise error.at(where) from error
    if row.mentions is not None and len(row.mentions) != len(layout):
        raise InputError(
            f"{where}: there must be as many mentions as phrases",
            value=(len(row.mentions), len(layout)),
            remedy="Give a text per box: how the prompt words it.",
        )
    image = None
    if row.image is not None:
        try:
            # one that is missing is named by check_items
            image = folder.find(row.image) or folder.folder / row.image
        except InputError as error:
            raise error.at(where) from error
    return EvalItem(
        id=row.id,
        prompt=row.prompt,
        layout=layout,
        negative_prompt=row.negative_prompt,
        mentions=None if row.mentions is None else tuple(row.mentions),
        image=image,
    )


def check_items(items: Sequence[EvalItem]) -> None:
    """What must hold for the whole list.

    Raises:
        InputError: see :func:`read_items`.
    """
    for item in items:
        if not _NAME.fullmatch(item.id):
            raise InputError(
                "an id cannot be a file name",
                value=item.id,
                remedy="Use up to 100 letters, digits, dots, dashes and underscores.",
            )
    # some file systems do not tell upper from lower case
    twice = [name for name, times in Counter(i.id.casefold() for i in items).items() if times > 1]
    if twice:
        raise InputError("an id is there twice", value=twice[0], remedy="Give each line its own.")
    without = [item.id for item in items if not item.has_real]
    if without and len(without) < len(items):
        raise InputError(
            f"{len(without)} of {len(items)} lines have no image, so the counts of real and "
            "generated ones differ",
            value=without[0],
            remedy="Give every line an image, or none.",
        )
    missing = [item for item in items if item.image is not None and not is_file(item.image)]
    if missing:
        raise InputError(
            f"{len(missing)} real images are missing, the first one of {missing[0].id}",
            value=str(missing[0].image),
            remedy="Paths are relative to the manifest.",
        )


def emoji_items(split: Split, count: int) -> list[EvalItem]:
    """The layouts 0 .. count-1 of a split of EmojiScenes; all wordings take their turn."""
    items = []
    for index in range(count):
        scene = sample_scene(split, index)
        names = [item.category for item in scene.objects]
        items.append(
            EvalItem(
                id=f"{split}-{index:06d}",
                prompt=scene.captions[index % len(scene.captions)],
                layout=Layout(names, [item.box for item in scene.objects]),
                mentions=tuple(_PLURALS[name] if names.count(name) > 1 else name for name in names),
                scene=(split, index),
            )
        )
    return items


def coco_items(
    folder: Path,
    count: int,
    *,
    skipped: list[BadRecord] | None = None,
    image_root: Path | None = None,
) -> list[EvalItem]:
    """The first ``count`` images of COCO 2014's validation split that have captions.

    Args:
        folder: with val2014/ and annotations/, as COCO's archives unpack.
        skipped, image_root: as in :func:`read_coco`.

    Raises:
        InputError: files are missing or malformed, or there are fewer images.
    """
    annotations = folder / "annotations"
    examples = read_coco(
        folder / "val2014",
        annotations / "instances_val2014.json",
        annotations / "captions_val2014.json",
        skipped=skipped,
        image_root=image_root,
    )
    check_enough(len(examples), count)
    items = [
        EvalItem(
            id=f"{example.image_id:012d}",
            prompt=example.captions[0],
            layout=example.layout,
            image=example.path,
            image_size=(example.width, example.height),
        )
        for example in examples[:count]
    ]
    check_items(items)
    return items


def check_enough(found: int, count: int) -> None:
    """Refuse to take more images than there are.

    Raises:
        InputError.
    """
    if found < count:
        raise InputError(
            f"{count} images are asked for, there are fewer", value=found, remedy="Lower --count."
        )


def items_hash(items: Sequence[EvalItem]) -> str:
    """sha256 of all that makes the images: a run over other layouts is another run."""
    content = [
        item.model_dump(mode="json", exclude={"image", "image_size", "crop"}) for item in items
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
