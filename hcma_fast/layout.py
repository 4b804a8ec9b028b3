"""Layouts: phrases with boxes, checked once and immutable afterwards."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH
from hcma_fast.errors import InputError, UsageError, words_of
from hcma_fast.scalars import real_number

Box = tuple[float, float, float, float]
#: CLIP's pre-tokenizer makes at least one token of a word, so more words cannot fit
_MAX_WORDS = TOKEN_LENGTH - 2
_SHOWN_LETTERS = 80


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
            super().__init__(phrases=tuple(phrases), boxes=tuple(_four_numbers(boxes)))
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
        return cls(phrases, [_xywh_to_xyxy(box) for box in _four_numbers(boxes)])

    @classmethod
    def from_pixels(
        cls, phrases: Iterable[str], boxes: Iterable[Sequence[float]], width: float, height: float
    ) -> Layout:
        """From xyxy in pixels of an image of ``width`` x ``height``."""
        width, height = _check_size(width, height)
        scale = (width, height, width, height)
        shares = [[v / s for v, s in zip(box, scale, strict=True)] for box in _four_numbers(boxes)]
        return cls(phrases, shares)

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
        width, height = _check_size(width, height)
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
                (bbox,) = _four_numbers([annotation["bbox"]])
                if not all(math.isfinite(v) for v in bbox):
                    raise ValueError("bbox is not finite")
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"a malformed COCO annotation: {words_of(error)}",
                    value=annotation,
                    remedy="It needs bbox (x, y, width, height) and a known category_id.",
                ) from error
            x0, y0, x1, y1 = _xywh_to_xyxy(bbox)
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
    def from_json(cls, text: str | bytes) -> Layout:
        """From ``{"phrases": [...], "boxes": [[x0, y0, x1, y1], ...]}``."""
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"a layout must be JSON: {error}",
                value=text[:_SHOWN_LETTERS] if isinstance(text, str | bytes) else text,
                remedy="See README for the format.",
            ) from error
        if not isinstance(data, dict) or set(data) != {"phrases", "boxes"}:
            raise InputError(
                "a layout has exactly the keys phrases and boxes",
                value=sorted(data) if isinstance(data, dict) else type(data).__name__,
                remedy='Write {"phrases": ["dog"], "boxes": [[0.1, 0.1, 0.5, 0.9]]}.',
            )
        if not isinstance(data["phrases"], list) or not isinstance(data["boxes"], list):
            raise InputError(
                "phrases and boxes must be lists",
                value=tuple(type(data[key]).__name__ for key in ("phrases", "boxes")),
                remedy="See README for the format.",
            )
        return cls(data["phrases"], data["boxes"])

    def to_json(self) -> str:
        """JSON that :meth:`from_json` reads back to an equal layout."""
        return self.model_dump_json()

    @classmethod
    def from_file(cls, path: str | Path) -> Layout:
        """Read a JSON file."""
        try:
            text = Path(path).read_bytes()
        except (OSError, ValueError, TypeError) as error:  # ValueError: a zero byte in the name
            problem = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"cannot read the layout file: {problem}",
                value=path,
                remedy="Check the path.",
            ) from error
        return cls.from_json(text)

    def to_file(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            UsageError: the place cannot be written to.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.part")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise UsageError(
                f"cannot write the layout file: {error.strerror}",
                value=str(path),
                remedy="Give a file name in a folder that exists and that you may write to.",
            ) from error

    @staticmethod
    def parse_box(text: str) -> tuple[str, Box]:
        """``"dog:0.05,0.3,0.45,0.9"`` -> ("dog", (0.05, 0.3, 0.45, 0.9)), checked."""
        phrase, colon, numbers = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        try:
            values = tuple(float(part) for part in numbers.split(","))
        except ValueError:
            values = ()
        if not colon or len(values) != 4:
            raise InputError(
                "a box must read PHRASE:X0,Y0,X1,Y1",
                value=text,
                remedy='For example "dog:0.05,0.3,0.45,0.9".',
            )
        parsed = Layout([phrase.strip()], [values])
        return parsed.phrases[0], parsed.boxes[0]

    def padded(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Boxes (30, 4) and mask (30,) float32, zero-padded."""
        boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
        mask = np.zeros(MAX_OBJECTS, np.float32)
        if self.boxes:
            boxes[: len(self)] = self.boxes
            mask[: len(self)] = 1
        return boxes, mask


def _four_numbers(boxes: Iterable[Sequence[float]]) -> list[Box]:
    """Each box as four floats; text and truth values, which float() would read, are refused."""
    try:
        rows = [tuple(box) for box in boxes]
    except TypeError as error:
        raise InputError(
            f"boxes must be a list of boxes ({error})",
            value=boxes,
            remedy="Write [[0.1, 0.1, 0.5, 0.9]].",
        ) from error
    found: list[Box] = []
    for index, row in enumerate(rows):
        try:
            if any(isinstance(value, str | bytes | bool) for value in row):
                raise TypeError("text or a truth value")
            a, b, c, d = (float(value) for value in row)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(
                f"box {index} is not four numbers",
                value=row,
                remedy="Give four numbers, x0, y0, x1, y1 as shares of the image.",
            ) from error
        found.append((a, b, c, d))
    return found


def _xywh_to_xyxy(box: Box) -> Box:
    x, y, width, height = box
    return x, y, x + width, y + height


def _check_size(width: object, height: object) -> tuple[float, float]:
    try:
        found = real_number(width), real_number(height)
    except ValueError:
        found = (0.0, 0.0)
    if min(found) <= 0:
        raise InputError(
            "the image size must be positive",
            value=(width, height),
            remedy="Give width and height in pixels.",
        )
    return found


def is_empty(box: Box) -> bool:
    """Without area in float32, the precision of the graphs."""
    x0, y0, x1, y1 = (np.float32(v) for v in box)
    return bool(x1 <= x0 or y1 <= y0)


def _check_box(index: int, box: Box) -> None:
    x0, y0, x1, y1 = box
    if not all(math.isfinite(v) for v in box):
        problem, remedy = "has a value that is not finite", "Use numbers in [0, 1]."
    elif not all(0 <= v <= 1 for v in box):
        problem, remedy = "leaves the image", "Use shares of the image in [0, 1]; see from_pixels."
    elif x1 < x0 or y1 < y0:
        problem, remedy = "is inverted", "Order it x0, y0, x1, y1; see from_xywh."
    elif is_empty(box):
        problem, remedy = "is empty", "Give it a positive width and height."
    else:
        return
    raise InputError(f"box {index} {problem}", value=box, remedy=remedy)
