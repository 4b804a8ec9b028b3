"""What ``generate`` is asked for: one job per image, all checked before anything is loaded."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hcma_fast.box_lists import (
    SHARES,
    BoxNotation,
    comfy_boxes,
    comfy_prompts,
    is_comfy,
    llm_answer,
    llm_boxes,
)
from hcma_fast.config import MAX_SEED
from hcma_fast.errors import HcmaError, InputError, OutputError
from hcma_fast.files import parse_json, read_json, read_text
from hcma_fast.layout import Layout

INPUT_BYTES = 2**30
"""Most bytes of ``--input``: about three million lines"""
_SLUG_LETTERS = 48
_SIDECAR_BYTES = 2**20
_NAME = re.compile(r"\w[\w.-]*")
_ID_BYTES, STEM_BYTES = 120, 220
_LINE_REMEDY = (
    'A line reads {"prompt": "...", "phrases": ["dog"], "boxes": [[0.1, 0.1, 0.5, 0.9]]}, and may '
    "have seed, negative_prompt, id, box_format, box_units and box_size."
)


@dataclass(frozen=True)
class Job:
    """One image to make."""

    stem: str
    """file name without suffix"""
    prompt: str
    negative_prompt: str
    layout: Layout
    seed: int
    where: str = ""
    """where it comes from, such as "line 3", for errors"""
    name: str = ""
    """``stem`` without the seed"""
    drawn: bool = False
    """nobody asked for this seed, so any other is as good"""

    def files(self, folder: Path) -> tuple[Path, Path, Path]:
        """Paths of the image, its sidecar and its overlay."""
        return (
            folder / f"{self.stem}.png",
            folder / f"{self.stem}.json",
            folder / f"{self.stem}-overlay.png",
        )


class Request(BaseModel):
    """A prompt with its layout, as a line of ``--input`` holds it; types are not converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str
    phrases: list[str] = []
    boxes: list[list[float]] = []
    box_format: str | None = None
    box_units: str | None = None
    box_size: list[float] | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    id: str | None = None

    def layout(self, notation: BoxNotation = SHARES) -> Layout:
        """Its phrases and boxes; ``notation`` says what the boxes mean, unless it says so itself.

        Raises:
            InputError: not a layout.
        """
        own = notation.updated(self.model_dump(include={"box_format", "box_units", "box_size"}))
        return Layout(self.phrases, own.to_shares(self.boxes))

    def jobs(
        self,
        *,
        num_images: int,
        seed: int | None,
        negative: str,
        where: str,
        notation: BoxNotation = SHARES,
    ) -> list[Job]:
        """One job per image, seeds counting up; the arguments are what the request leaves open.

        Raises:
            InputError: a bad layout, name or seed, with ``where`` in front.
        """
        layout = at(where, self.layout, notation)
        first = seed if self.seed is None else self.seed
        drawn = first is None
        if first is None:
            first = secrets.randbelow(2**31)
        if not 0 <= first <= MAX_SEED - num_images + 1:
            raise InputError(
                _join(where, "a seed must lie between 0 and 2**64 - 1"),
                value=first,
                remedy="Choose a smaller, positive one.",
            )
        name = at(where, check_name, self.id) if self.id is not None else slug(self.prompt)
        negative = negative if self.negative_prompt is None else self.negative_prompt
        for text in (self.prompt, negative, *layout.phrases):
            _check_unicode(text, where)
        return [
            Job(
                stem=f"{name}-{first + i}",
                prompt=self.prompt,
                negative_prompt=negative,
                layout=layout,
                seed=first + i,
                name=name,
                drawn=drawn,
                where=where,
            )
            for i in range(num_images)
        ]


def parse_request(data: str | bytes | dict[str, Any], where: str = "") -> Request:
    """A request from a JSON line, or from values.

    A null, as pandas writes a missing value, counts as left out; 7.0 is a whole number.

    Raises:
        InputError: not JSON, a missing or unknown key, or a value of a wrong type.
    """
    if not isinstance(data, dict):
        data = at(where, parse_json, data, "a request")
    if not isinstance(data, dict):
        raise InputError(
            _join(where, "a request is a JSON object"), value=data, remedy=_LINE_REMEDY
        )
    try:
        return Request.model_validate(plain_values(data, whole=("seed",), names=("id",)))
    except ValidationError as error:
        raise InputError(
            _join(where, explain(error)),
            value=_input_of(error),
            remedy=_LINE_REMEDY if where else "Write plain text.",
        ) from error


def read_requests(path: Path) -> list[tuple[str, Request]]:
    """The requests of a file with their places ("line 3"); blank lines are skipped.

    JSONL, or a JSON array of the same objects, or one object. An object may also be a record or a
    cache of LLM-grounded diffusion, or a ComfyUI workflow in the API format.

    Raises:
        InputError: the file cannot be read or is empty, or a line is wrong.
    """
    text = read_text(path, "the input file", limit=INPUT_BYTES)
    records = [
        record for where, data in _documents(text) for record in at(where, as_requests, data, where)
    ]
    if not records:
        raise InputError("the input file has no lines", value=str(path), remedy=_LINE_REMEDY)
    return [(where, parse_request(record, where)) for where, record in records]


def _documents(text: str) -> list[tuple[str, Any]]:
    """The JSON values in ``text``: one a line, the items of an array, or the whole."""
    # not splitlines: a JSON string may hold the other line ends of Unicode
    lines = [(f"line {n}", line.strip()) for n, line in enumerate(text.split("\n"), start=1)]
    lines = [(where, line) for where, line in lines if line]
    if not lines:
        return []
    try:
        first = _parse(lines[0][1], lines[0][0])
    except InputError:
        # the first line of an array or object that spans many, or a bad line
        try:
            return _items(parse_json(text, "the input file"))
        except InputError as error:
            if lines[0][1] in ("[", "{") and len(lines) > 1:
                raise error from None
        raise
    if isinstance(first, list) and len(lines) == 1:
        return _items(first)
    return [(lines[0][0], first), *((where, _parse(line, where)) for where, line in lines[1:])]


def _parse(line: str, where: str) -> Any:
    return at(where, parse_json, line, "a request")


def _items(data: Any) -> list[tuple[str, Any]]:
    if not isinstance(data, list):
        return [("", data)]
    return [(f"item {number}", item) for number, item in enumerate(data, start=1)]


def as_requests(data: Any, where: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The fields of each request in ``data``, one of ours or another program's.

    Raises:
        InputError: it is no object, or the other program's boxes cannot be read.
    """
    if not isinstance(data, dict):
        raise InputError("a request is a JSON object", value=data, remedy=_LINE_REMEDY)
    if "gen_boxes" in data:
        return [(where, _from_llm(data.get("prompt"), data))]
    if is_comfy(data):
        phrases, boxes = comfy_boxes(data, SHARES)
        prompt, negative = comfy_prompts(data)
        fields = {"prompt": prompt, "negative_prompt": negative}
        return [(where, {**fields, "phrases": phrases, "boxes": [list(box) for box in boxes]})]
    if data and "prompt" not in data and all(_is_answers(value) for value in data.values()):
        return [
            (_join(where, f"{prompt[:_SLUG_LETTERS]!r}"), _from_llm(prompt, llm_answer(texts[0])))
            for prompt, texts in data.items()
        ]
    return [(where, data)]


def _is_answers(value: Any) -> bool:
    """Is it an entry of LLM-grounded diffusion's cache: the model's answers to one prompt?"""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _from_llm(prompt: Any, record: dict[str, Any]) -> dict[str, Any]:
    phrases, boxes = llm_boxes(record["gen_boxes"], SHARES)
    return {
        "prompt": prompt,
        "phrases": phrases,
        "boxes": [list(box) for box in boxes],
        "negative_prompt": record.get("neg_prompt") or None,
        **{key: record[key] for key in ("seed", "id") if key in record},
    }


def plain_values(
    data: dict[str, Any], whole: Sequence[str] = (), names: Sequence[str] = ()
) -> dict[str, Any]:
    """``data`` without nulls, with whole floats as integers, as pandas' to_json writes columns.

    Args:
        whole: keys of integers.
        names: keys of texts that may also be written as integers.
    """
    found = {key: value for key, value in data.items() if value is not None}
    for key in (*whole, *names):
        value = found.get(key)
        if isinstance(value, float) and value.is_integer():
            found[key] = int(value)
        if key in names and isinstance(found.get(key), int) and not isinstance(value, bool):
            found[key] = str(found[key])
    return found


def check_outputs(
    jobs: Sequence[Job], folder: Path, *, force: bool, other: str = "another --out or --seed"
) -> None:
    """Refuse two jobs with one name, and files that exist already (unless ``force``).

    Even with ``force`` no file is replaced that lies where a sidecar would, and is none.

    Args:
        other: what gives new files instead, for the message.

    Raises:
        InputError, OutputError.
    """
    owners: dict[str, Job] = {}
    for job in jobs:
        for path in job.files(folder):
            # some file systems do not tell upper from lower case
            owner = owners.setdefault(path.name.casefold(), job)
            if owner is not job:
                raise InputError(
                    f"{job.where or 'this image'} and {owner.where or 'another'} would both write "
                    f"{path.name}",
                    remedy='Give each line an "id" of its own.',
                )
        # the overlay in any case: one of an earlier image would not show the new one
        for path in job.files(folder):
            if path.is_dir() or (os.path.lexists(path) and not force):
                raise OutputError(
                    "the output exists already",
                    value=str(path),
                    remedy=f"Use --force to replace it, or {other}.",
                )
        _check_companions(job, folder, other)


def _check_companions(job: Job, folder: Path, other: str) -> None:
    """Refuse to replace what lies under the names of a sidecar and an overlay, but is neither."""
    image, sidecar, overlay = job.files(folder)
    taken = [path for path in (sidecar, overlay) if os.path.lexists(path)]
    # the sidecar is written last: a killed run leaves an image, with its overlay, and no sidecar
    half = image.is_file() and not os.path.lexists(sidecar)
    if taken and not half and not _is_sidecar(sidecar, image.name):
        raise OutputError(
            "this file is in the way, and hcma-fast did not write it with an image: it is not "
            "replaced",
            value=str(taken[0]),
            remedy=f"Move it away, or use {other}.",
        )


def _is_sidecar(path: Path, image: str) -> bool:
    """Is it the sidecar, of any version, of the image with this name?"""
    try:
        values = read_json(path, "the sidecar", limit=_SIDECAR_BYTES)
    except InputError:
        return False
    return (
        isinstance(values, dict)
        and values.get("image") == image
        and isinstance(values.get("image_sha256"), str)
    )


def slug(text: str) -> str:
    """A file name for ``text``: lower case, words joined by dashes, at most 48 letters."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-_")
    return words[:_SLUG_LETTERS].rstrip("-_") or "image"


def check_name(name: str, max_bytes: int = _ID_BYTES) -> str:
    """``name``, when it is safe as the start of a file name, at most ``max_bytes`` long.

    Raises:
        InputError.
    """
    if not _NAME.fullmatch(name) or len(name.encode()) > max_bytes:
        raise InputError(
            "this cannot be a file name",
            value=name,
            remedy=f"Use letters, digits, dots, dashes and underscores, at most {max_bytes} bytes.",
        )
    return name


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            _join(where, "this text is not valid Unicode"), value=text, remedy="Write it in UTF-8."
        ) from error


def at(where: str, call: Any, *arguments: Any) -> Any:
    """``call(*arguments)``; an error that it raises says ``where``, if that is not empty."""
    try:
        return call(*arguments)
    except HcmaError as error:
        if not where:
            raise
        raise error.at(where) from error


def explain(error: ValidationError) -> str:
    """The first problem that pydantic found, in one clause."""
    first = error.errors()[0]
    return ": ".join([*(str(part) for part in first["loc"]), first["msg"]])


def _input_of(error: ValidationError) -> object:
    value = error.errors()[0]["input"]
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SLUG_LETTERS * 2 else text[: _SLUG_LETTERS * 2] + "..."


def _join(where: str, what: str) -> str:
    return f"{where}: {what}" if where else what
