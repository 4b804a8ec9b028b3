"""The records of COCO's annotation files, each checked by itself."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hcma_fast.errors import InputError
from hcma_fast.files import decode_text, read_file

Kind = Literal["image", "category", "annotation", "caption"]
_MOST_BYTES = 2**33
#: as tensors hold them
Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Side = Annotated[int, Field(gt=0, lt=2**31)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out: its kind and id, the file that is to blame, and why."""

    kind: Kind
    id: int | None
    """None where it has no usable one"""
    path: str
    why: str


class _Record(BaseModel):
    # COCO's records hold more: licences, segmentations, URLs
    model_config = ConfigDict(frozen=True, extra="ignore")


class NumberedRecord(_Record):
    """Every record has an id."""

    id: Id


class ImageRecord(NumberedRecord):
    """An entry of ``images``."""

    file_name: str
    width: _Side
    height: _Side


class CategoryRecord(NumberedRecord):
    """An entry of ``categories``."""

    name: str


class InstanceRecord(NumberedRecord):
    """An entry of ``annotations`` of an instances file; ``bbox`` is (x, y, width, height)."""

    image_id: Id
    category_id: Id
    bbox: tuple[_Number, _Number, _Number, _Number]
    iscrowd: int = 0

    @field_validator("bbox")
    @classmethod
    def _is_a_box(cls, bbox: tuple[float, float, float, float]) -> tuple[float, ...]:
        x, y, width, height = bbox
        if width < 0 or height < 0:
            raise ValueError("the width or height of the box is negative")
        if max(abs(value) for value in (x, y, x + width, y + height)) > 2.0**31:
            raise ValueError("the box is larger than any image")
        return bbox


class CaptionRecord(NumberedRecord):
    """An entry of ``annotations`` of a captions file."""

    image_id: Id
    caption: str


# what is no such record stays as it was read, and is explained by _explain
class InstancesFile(_Record):
    """``instances_*.json``."""

    images: list[Annotated[ImageRecord | Any, Field(union_mode="left_to_right")]]
    categories: list[Annotated[CategoryRecord | Any, Field(union_mode="left_to_right")]]
    annotations: list[Annotated[InstanceRecord | Any, Field(union_mode="left_to_right")]]


class CaptionsFile(_Record):
    """``captions_*.json``."""

    annotations: list[Annotated[CaptionRecord | Any, Field(union_mode="left_to_right")]]


_File = TypeVar("_File", InstancesFile, CaptionsFile)
_AnyRecord = TypeVar("_AnyRecord", bound=NumberedRecord)


def read_annotations(path: Path, kind: type[_File]) -> _File:
    """Read a file; records may still be bad.

    Raises:
        InputError: it is missing, or not in COCO's format as a whole.
    """
    content = read_file(path, "the annotations", limit=_MOST_BYTES)
    try:
        return kind.model_validate_json(decode_text(content, "the file of annotations"))
    except InputError as error:
        raise InputError(error.what, value=str(path), remedy=error.remedies) from error
    except ValidationError as error:
        fail(f"not in COCO's format: {_problem(error)}", path, error)


def usable(
    kind: Kind, model: type[_AnyRecord], values: Sequence[Any], path: Path, bad: list[BadRecord]
) -> list[_AnyRecord]:
    """The records that are in order; the others are explained in ``bad``."""
    records = []
    for index, value in enumerate(values):
        if isinstance(value, model):
            records.append(value)
        else:
            bad.append(_explain(kind, model, value, index, path))
    return records


def _explain(
    kind: Kind, model: type[NumberedRecord], value: Any, index: int, path: Path
) -> BadRecord:
    number: int | None = None
    with suppress(ValidationError):
        number = NumberedRecord.model_validate(value).id
    try:
        model.model_validate(value)
        why = "it cannot be read"
    except ValidationError as error:
        why = _problem(error)
    named = f"{kind} {number}" if number is not None else f"{kind} at index {index}"
    return BadRecord(kind, number, str(path), f"{named}: {why}")


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the record"
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "json_invalid":
        return str(first["msg"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (not {reprlib.repr(first['input'])})"


def fail(what: str, path: Path, cause: Exception | None = None) -> NoReturn:
    """Raise InputError about a file as a whole."""
    remedy = "Give the images, instances and captions of one split, whole and unchanged."
    raise InputError(what, value=str(path), remedy=remedy) from cause
