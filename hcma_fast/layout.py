"""Layouts: phrases with boxes, checked once and immutable afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from hcma_fast.box_lists import (
    SHARES,
    Box,
    BoxNotation,
    check_size,
    four_numbers,
    read_box_list,
)
from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH
from hcma_fast.errors import InputError, Remedy, words_of
from hcma_fast.files import read_text, write_file

#: CLIP's pre-tokenizer makes at least one token of a word, so more words cannot fit
_MAX_WORDS = TOKEN_LENGTH - 2


_PIXELS = Remedy(
    "Use shares of the image in [0, 1]; see Layout.from_pixels.",
    command="Use shares of the image in [0, 1], or say --box-units pixel --box-size WIDTH HEIGHT.",
    http="Use shares of the image in [0, 1].",
)
_ORDER = Remedy(
    "Order it x0, y0, x1, y1; see Layout.from_xywh.",
    command="Order it x0, y0, x1, y1, or say --box-format xywh.",
    http="Order it x0, y0, x1, y1.",
)
__all__ = ["Box", "BoxNotation", "Layout", "is_empty"]


class Layout(BaseModel):
    """Phrases and their boxes, xyxy as shares of the image in [0, 1]; at most 30.

    Raises:
        InputError: counts differ, too many, a blank or overlong phrase, or a box that is not four
            finite numbers, leaves the image, is inverted or empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    phrases: tuple[str, ...]
    boxes: tuple[Box, ...]

    def __init__(self, phrases: Iterable[str], boxes: Iterable[Sequence[float]]) -> None:
        if isinstance(phrases, str):
            raise InputError("phrases must be a list", value=phrases, remedy='Write ["dog"].')
        try:
            super().__init__(phrases=tuple(phrases), boxes=tuple(four_numbers(boxes)))
        except (ValidationError, TypeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            where = ".".join(str(part) for part in first["loc"]) if first else "phrases"
            raise InputError(
                f"{where}: {first['msg'] if first else error}",
                value=first["input"] if first else phrases,
                remedy="Give a list of strings, one per box.",
            ) from error
        self._check()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, with ``phrases`` or ``boxes`` replaced and checked like those of a new layout."""
        if update is None:
            return super().model_copy(deep=deep)
        if not isinstance(update, Mapping) or not update.keys() <= {"phrases", "boxes"}:
            raise InputError(
                "only phrases and boxes of a layout can be replaced",
                value=update,
                remedy='Write update={"boxes": [[0.1, 0.1, 0.5, 0.9]]}.',
            )
        return type(self)(**{**dict(self), **update})

    def _check(self) -> None:
        if len(self.phrases) != len(self.boxes):
            raise InputError(
                "the counts of phrases and boxes differ",
                value=(len(self.phrases), len(self.boxes)),
                remedy="Give one box per phrase.",
            )
        if len(self.phrases) > MAX_OBJECTS:
            raise InputError(
                f"a layout holds at most {MAX_OBJECTS} boxes",
                value=len(self.phrases),
                remedy="Leave out the smallest ones.",
            )
        for index, (phrase, box) in enumerate(zip(self.phrases, self.boxes, strict=True)):
            if not phrase.strip():
                raise InputError(
                    f"phrase {index} is blank", value=phrase, remedy="Name the object."
                )
            if any("\ud800" <= letter <= "\udfff" for letter in phrase):
                raise InputError(
                    f"phrase {index} has half of a surrogate pair, which is no text",
                    value=phrase,
                    remedy="Write the file as UTF-8.",
                )
            if len(phrase.split()) > _MAX_WORDS:
                raise InputError(
                    f"phrase {index} has more words than {TOKEN_LENGTH} tokens can hold",
                    value=len(phrase.split()),
                    remedy="A phrase names one object: shorten it.",
                )
            _check_box(index, box)

    def __len__(self) -> int:
        return len(self.phrases)

    @classmethod
    def empty(cls) -> Layout:
        """No boxes: the caption alone."""
        return cls([], [])

    @classmethod
    def from_xywh(cls, phrases: Iterable[str], boxes: Iterable[Sequence[float]]) -> Layout:
        """From (x, y, width, height) as shares of the image."""
        return cls(phrases, BoxNotation("xywh").to_shares(boxes))

    @classmethod
    def from_pixels(
        cls, phrases: Iterable[str], boxes: Iterable[Sequence[float]], width: float, height: float
    ) -> Layout:
        """From xyxy in pixels of an image of ``width`` x ``height``."""
        return cls(phrases, BoxNotation(units="pixel", size=(width, height)).to_shares(boxes))

    @classmethod
    def from_coco(
        cls,
        annotations: Iterable[Mapping[str, Any]],
        categories: Mapping[int, str],
        width: float,
        height: float,
    ) -> Layout:
        """From COCO annotations of one image: no crowds, clipped to the image, the largest 30.

        Largest first; boxes that clipping leaves empty are dropped, as COCO has some.

        Args:
            annotations: with ``bbox`` (x, y, width, height in pixels) and ``category_id``;
                not modified.
            categories: id -> name.

        Raises:
            InputError: an unknown category, a malformed annotation, or an image without a size.
        """
        width, height = check_size(width, height)
        found: list[tuple[float, str, Box]] = []
        try:
            entries = [dict(annotation) for annotation in annotations]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"COCO annotations must be a list of objects ({error})",
                value=annotations,
                remedy='Write [{"bbox": [x, y, width, height], "category_id": 1}].',
            ) from error
        for annotation in entries:
            try:
                if annotation.get("iscrowd"):
                    continue
                name = categories[annotation["category_id"]]
                (bbox,) = four_numbers([annotation["bbox"]])
                if not all(math.isfinite(v) for v in bbox):
                    raise ValueError("bbox is not finite")
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"a malformed COCO annotation: {words_of(error)}",
                    value=annotation,
                    remedy="It needs bbox (x, y, width, height) and a known category_id.",
                ) from error
            x, y, box_width, box_height = bbox
            x0, y0, x1, y1 = x, y, x + box_width, y + box_height
            box = (
                max(x0 / width, 0.0),
                max(y0 / height, 0.0),
                min(x1 / width, 1.0),
                min(y1 / height, 1.0),
            )
            if not is_empty(box):
                found.append(((box[2] - box[0]) * (box[3] - box[1]), name, box))
        found = sorted(found, key=lambda entry: -entry[0])[:MAX_OBJECTS]
        return cls([name for _, name, _ in found], [box for _, _, box in found])

    @classmethod
    def from_json(cls, text: str | bytes, notation: BoxNotation = SHARES) -> Layout:
        """From ``{"phrases": [...], "boxes": [[x0, y0, x1, y1], ...]}``, or another program's.

        Args:
            notation: what the boxes mean, where the text does not say. See
                :func:`hcma_fast.box_lists.read_box_list` for the formats.
        """
        return cls(*read_box_list(text, notation))

    def to_json(self) -> str:
        """JSON that :meth:`from_json` reads back to an equal layout."""
        return self.model_dump_json()

    @classmethod
    def from_file(cls, path: str | Path, notation: BoxNotation = SHARES) -> Layout:
        """Read a file as :meth:`from_json` does."""
        if not isinstance(path, str | Path):
            raise InputError("a layout file is a path", value=path, remedy="Give its name.")
        return cls.from_json(read_text(Path(path), "the layout file"), notation)

    def to_file(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            OutputError: the place cannot be written to.
        """
        if not isinstance(path, str | Path):
            raise InputError("a layout file is a path", value=path, remedy="Give its name.")
        write_file(Path(path), self.to_json().encode())

    @staticmethod
    def parse_box(text: str, notation: BoxNotation = SHARES) -> tuple[str, Box]:
        """``"dog:0.05,0.3,0.45,0.9"`` -> ("dog", (0.05, 0.3, 0.45, 0.9)), checked."""
        phrase, colon, numbers = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        try:
            values = tuple(float(part) for part in numbers.split(","))
        except ValueError:
            values = ()
        if not colon or len(values) != 4:
            last = "X1,Y1" if notation.format == "xyxy" else "WIDTH,HEIGHT"
            raise InputError(
                f"a box must read PHRASE:X0,Y0,{last}",
                value=text,
                remedy='For example "dog:0.05,0.3,0.45,0.9".',
            )
        parsed = Layout([phrase.strip()], notation.to_shares([values]))
        return parsed.phrases[0], parsed.boxes[0]

    def padded(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Boxes (30, 4) and mask (30,) float32, zero-padded."""
        boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
        mask = np.zeros(MAX_OBJECTS, np.float32)
        if self.boxes:
            boxes[: len(self)] = self.boxes
            mask[: len(self)] = 1
        return boxes, mask


def is_empty(box: Box) -> bool:
    """Without area in float32, the precision of the graphs."""
    x0, y0, x1, y1 = (np.float32(v) for v in box)
    return bool(x1 <= x0 or y1 <= y0)


def _check_box(index: int, box: Box) -> None:
    x0, y0, x1, y1 = box
    remedy: str | Remedy
    if not all(math.isfinite(v) for v in box):
        problem, remedy = "has a value that is not finite", "Use numbers in [0, 1]."
    elif not all(0 <= v <= 1 for v in box):
        problem, remedy = "leaves the image", _PIXELS
    elif x1 < x0 or y1 < y0:
        problem, remedy = "is inverted", _ORDER
    elif is_empty(box):
        problem, remedy = "is empty", "Give it a positive width and height."
    else:
        return
    raise InputError(f"box {index} {problem}", value=box, remedy=remedy)
