"""Boxes of generated pictures that were labelled by eye, one by one: what judges are measured by.

``assets/labelled-4.png`` holds the pictures (the fourth edition of `tiny`), tile by tile, and
``labelled-4.json`` each box with its phrase and label: "right" (the eye names it at once), "half"
(parts of it, or two at once) or "wrong" (a smudge, or another thing). ``LABELLING.md`` has the
rules. The half "test" was labelled a second time, without sight of the first labels. Bits differ
between processors, hence the pictures instead of the command that made them::

    python -m hcma_fast.bench.quality.metrics.likeness.labels --out FOLDER

It draws the pictures and contact sheets to label them by.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict

from hcma_fast.errors import InputError
from hcma_fast.files import make_folder, write_whole
from hcma_fast.layout import Box, Layout
from hcma_fast.program import run_program
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.train.data.emoji_scenes import (
    BACKGROUNDS,
    CATEGORY_NAMES,
    PLURALS,
    count_phrase,
    sample_scene,
)

Label = Literal["right", "half", "wrong"]
Half = Literal["train", "test"]
ASSETS = Path(__file__).parent / "assets"
_SINGLE_SIDES = (0.8, 0.6, 0.45, 0.3, 0.7, 0.5)
_MORE_SIDES = (0.75, 0.4, 0.6, 0.5)
_FIRST_PICTURES = 240
"""Pictures that are split into two halves; those after them only train"""
_SCENES = range(2000, 2064)
"""of the split "test", beyond those that benchmarks use"""
_FEW_STEPS_SCENES = range(2064, 2096)
_COLUMNS = 16
_SHEET_COLUMNS, _SHEET_ROWS, _CELL = 6, 5, 192


class LabelledBox(BaseModel):
    """A box of a picture and its label (None: not labelled yet)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    picture: int
    phrase: str
    box: Box
    label: Label | None = None
    second: Label | None = None
    """of a second, blind labelling, in the half "test" alone; judges are measured by ``label``"""

    @property
    def half(self) -> Half:
        """The half of the set that its picture belongs to, by a hash of its number."""
        if self.picture >= _FIRST_PICTURES:
            return "train"
        digest = hashlib.sha256(f"picture {self.picture}".encode()).digest()
        return "train" if digest[0] < 128 else "test"


class LabelledSet(BaseModel):
    """All boxes, in the order of their pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """weights that drew the pictures"""
    image_size: int
    boxes: tuple[LabelledBox, ...]


@dataclass(frozen=True)
class Drawing:
    """A picture to draw."""

    prompt: str
    layout: Layout
    seed: int
    steps: int


def _alone(row: int, column: int, side: float, stream: int, seed: int) -> Drawing:
    """A category alone, somewhere."""
    name, backgrounds = CATEGORY_NAMES[row], list(BACKGROUNDS)
    rng = np.random.default_rng([stream, row, column])
    x, y = (float(v) for v in rng.uniform(0.02, 0.98 - side, size=2).round(3))
    background = backgrounds[(row + 3 * column) % len(backgrounds)]
    return Drawing(
        f"{count_phrase(name, 1, PLURALS)} {background}",
        Layout([name], [(x, y, x + side, y + side)]),
        seed=seed,
        steps=50,
    )


def drawings() -> Iterator[Drawing]:
    """Each category alone, six times; scenes of several objects, some in few steps; each category
    alone four times more, to train on."""
    for row in range(len(CATEGORY_NAMES)):
        for column, side in enumerate(_SINGLE_SIDES):
            yield _alone(row, column, side, 12, seed=100 * row + column)
    for steps, indices in ((50, _SCENES), (20, _FEW_STEPS_SCENES)):
        for index in indices:
            scene = sample_scene("test", index)
            layout = Layout([o.phrase for o in scene.objects], [o.box for o in scene.objects])
            yield Drawing(scene.captions[index % 2], layout, seed=index, steps=steps)
    for row in range(len(CATEGORY_NAMES)):
        for column, side in enumerate(_MORE_SIDES):
            yield _alone(row, column, side, 16, seed=5000 + 100 * row + column)


def read_labelled(folder: Path = ASSETS) -> tuple[LabelledSet, NDArray[np.uint8]]:
    """The boxes, and the pictures (B, H, W, 3) uint8.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        found = LabelledSet.model_validate_json((folder / "labelled-4.json").read_bytes())
        with Image.open(folder / "labelled-4.png") as file:
            sheet = np.asarray(file.convert("RGB"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the labelled boxes cannot be read: {error}",
            value=str(folder),
            remedy=f"Restore {folder}.",
        ) from error
    side = found.image_size
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    tiles = sheet.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return found, tiles.reshape(rows * columns, side, side, 3)


def draw(pipe: HCMAPipeline, out: Path) -> None:
    """Write the pictures (those that are there stay), the sheet of all, and boxes without labels.

    Raises:
        OutputError: ``out`` cannot be written.
    """
    make_folder(out / "pictures")
    boxes: list[LabelledBox] = []
    pictures: list[NDArray[np.uint8]] = []
    for number, drawing in enumerate(drawings()):
        path = out / "pictures" / f"{number:04d}.png"
        if not path.exists():
            output = pipe(
                drawing.prompt,
                drawing.layout,
                seed=drawing.seed,
                num_inference_steps=drawing.steps,
            )
            write_whole(path, partial(output.images[0].save, format="PNG"))
        with Image.open(path) as file:
            pictures.append(np.asarray(file.convert("RGB")))
        boxes += [
            LabelledBox(picture=number, phrase=phrase, box=box)
            for phrase, box in zip(drawing.layout.phrases, drawing.layout.boxes, strict=True)
        ]
    side = pictures[0].shape[0]
    rows = -(-len(pictures) // _COLUMNS)
    tiles = np.zeros((rows * _COLUMNS, side, side, 3), np.uint8)
    tiles[: len(pictures)] = pictures
    tiles = tiles.reshape(rows, _COLUMNS, side, side, 3).swapaxes(1, 2)
    sheet = Image.fromarray(tiles.reshape(rows * side, _COLUMNS * side, 3))
    write_whole(out / "labelled-4.png", lambda file: sheet.save(file, "PNG", optimize=True))
    content = LabelledSet(model=pipe.weights_hash, image_size=side, boxes=tuple(boxes))
    text = content.model_dump_json(indent=1).encode()
    write_whole(out / "labelled-4.json", lambda file: file.write(text))
    _contact_sheets(out, boxes, pictures)


def _contact_sheets(
    out: Path, boxes: Sequence[LabelledBox], pictures: Sequence[NDArray[np.uint8]]
) -> None:
    """Thirty boxes on a sheet, enlarged, with their numbers and phrases."""
    each = _SHEET_COLUMNS * _SHEET_ROWS
    for first in range(0, len(boxes), each):
        sheet = Image.new("RGB", (_SHEET_COLUMNS * _CELL, _SHEET_ROWS * (_CELL + 14)))
        pen = ImageDraw.Draw(sheet)
        for place, item in enumerate(boxes[first : first + each]):
            row, column = divmod(place, _SHEET_COLUMNS)
            x, y = column * _CELL, row * (_CELL + 14)
            picture = Image.fromarray(pictures[item.picture])
            place_of = _with_margin(item.box, picture)
            size = (_CELL - 4, _CELL - 4)
            shown = picture.resize(size, Image.Resampling.BICUBIC, box=place_of)
            sheet.paste(shown, (x, y + 14))
            pen.text((x + 2, y + 1), f"{first + place} {item.phrase}", fill=(255, 255, 255))
        path = out / f"sheet-{first // each:02d}.png"
        write_whole(path, partial(sheet.save, format="PNG"))


def _with_margin(box: Box, picture: Image.Image) -> tuple[float, float, float, float]:
    """A square around ``box`` in pixels, a tenth larger, inside the picture."""
    side = min(1.0, 1.1 * max(box[2] - box[0], box[3] - box[1]))
    x = min(max((box[0] + box[2] - side) / 2, 0.0), 1.0 - side)
    y = min(max((box[1] + box[3] - side) / 2, 0.0), 1.0 - side)
    width, height = picture.size
    return x * width, y * height, (x + side) * width, (y + side) * height


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.labels",
        description="Draw the pictures whose boxes are to be labelled, and contact sheets.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--backend", default="onnxruntime")
    args = parser.parse_args(arguments)
    draw(HCMAPipeline.from_pretrained("tiny", backend=args.backend), args.out)
    print(f"wrote the pictures and contact sheets to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_program(main))
