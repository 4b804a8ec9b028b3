"""What ``--input`` holds: requests as JSON lines, and as other programs write them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
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
from hcma_fast.cli.generate.jobs import Job, at, jobs_of
from hcma_fast.config import Settings
from hcma_fast.errors import HcmaError, InputError, UsageError
from hcma_fast.files import parse_json, read_text
from hcma_fast.layout import Layout
from hcma_fast.runtime.request import Request

INPUT_BYTES = 2**30
"""Most bytes of ``--input``: about three million lines"""
_SHOWN_LETTERS = 48
_LINE_REMEDY = (
    'A line reads {"prompt": "...", "phrases": ["dog"], "boxes": [[0.1, 0.1, 0.5, 0.9]]}, and may '
    "have id, box_format, box_units, box_size and the fields of a request, such as seed."
)


class Boxes(BaseModel):
    """What a line says beside the request's own fields; types are not converted."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    phrases: list[str] = []
    boxes: list[list[float]] = []
    box_format: str | None = None
    box_units: str | None = None
    box_size: list[float] | None = None
    id: str | None = None

    def layout(self, notation: BoxNotation = SHARES) -> Layout:
        """Its phrases and boxes; ``notation`` says what the boxes mean, unless it says so itself.

        Raises:
            InputError: not a layout.
        """
        own = notation.updated(self.model_dump(include={"box_format", "box_units", "box_size"}))
        return Layout(self.phrases, own.to_shares(self.boxes))


_NO_BOXES = Boxes()


@dataclass(frozen=True)
class Line:
    """A line of ``--input``: a request that leaves open what the options say."""

    values: Mapping[str, Any]
    """of the request, by its fields; not checked yet"""
    boxes: Boxes = _NO_BOXES
    where: str = ""
    """such as "line 3", for errors"""

    def jobs(
        self,
        options: Mapping[str, Any],
        *,
        num_images: int = 1,
        notation: BoxNotation = SHARES,
        request_type: type[Request] = Request,
    ) -> list[Job]:
        """One job per image, seeds counting up.

        Args:
            options: values of the request that the line leaves open.

        Raises:
            InputError: a bad value, layout or name, with ``where`` in front.
        """
        values = dict(options)
        for name, value in self.values.items():
            said = values.get(name)
            # of settings and savings the line replaces those that it names
            if isinstance(said, Settings) and isinstance(value, Mapping):
                values[name] = {**said.model_dump(exclude_unset=True), **value}
            else:
                values[name] = value
        drawn = "seed" not in values
        if drawn:
            values["seed"] = secrets.randbelow(2**31)
        layout = values.pop("layout", None)
        if layout is None or self.boxes.phrases or self.boxes.boxes:
            layout = at(self.where, self.boxes.layout, notation)
        request = self._checked(request_type, {**values, "layout": layout})
        return jobs_of(
            request, num_images=num_images, name=self.boxes.id, where=self.where, drawn=drawn
        )

    def _checked(self, request_type: type[Request], values: Mapping[str, Any]) -> Request:
        if "prompt" not in values:
            raise InputError(
                _join(self.where, "a request needs a prompt"),
                value=sorted(values.keys() - {"seed", "layout"}) or None,
                remedy=_LINE_REMEDY,
            )
        try:
            return request_type(**values)
        except UsageError as error:
            if not self.where:
                raise
            # the options have been checked: this is the file's fault
            what = _join(self.where, error.what)
            raise InputError(what, value=error.value, remedy=_LINE_REMEDY) from error
        except HcmaError as error:
            raise error.at(self.where) if self.where else error from error


def parse_line(data: str | bytes | Mapping[str, Any], where: str = "") -> Line:
    """A line from JSON, or from values.

    A null, as pandas writes a missing value, counts as left out; 7.0 is a whole number.

    Raises:
        InputError: not JSON, or phrases and boxes of a wrong type.
    """
    if not isinstance(data, Mapping):
        data = at(where, parse_json, data, "a request")
    if not isinstance(data, Mapping):
        raise InputError(
            _join(where, "a request is a JSON object"), value=data, remedy=_LINE_REMEDY
        )
    values = _plain_values(data)
    try:
        boxes = Boxes.model_validate(values)
    except ValidationError as error:
        raise InputError(
            _join(where, explain(error)),
            value=error.errors()[0]["input"],
            remedy=_LINE_REMEDY if where else "Write plain text.",
        ) from error
    own = {name: value for name, value in values.items() if name not in Boxes.model_fields}
    return Line(own, boxes, where)


def read_lines(path: Path) -> list[Line]:
    """The lines of a file; blank ones are skipped.

    JSONL, or a JSON array of the same objects, or one object. An object may also be a record or a
    cache of LLM-grounded diffusion, or a ComfyUI workflow in the API format.

    Raises:
        InputError: the file cannot be read or is empty, or a line is wrong.
    """
    text = read_text(path, "the input file", limit=INPUT_BYTES)
    records = [
        record for where, data in _documents(text) for record in at(where, records_in, data, where)
    ]
    if not records:
        raise InputError("the input file has no lines", value=str(path), remedy=_LINE_REMEDY)
    return [parse_line(record, where) for where, record in records]


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


def records_in(data: Any, where: str = "") -> list[tuple[str, dict[str, Any]]]:
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
            (_join(where, f"{prompt[:_SHOWN_LETTERS]!r}"), _from_llm(prompt, llm_answer(texts[0])))
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


def _plain_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` without nulls, and "17" for the id 17.0: so pandas' to_json writes columns."""
    found = {key: value for key, value in data.items() if value is not None}
    name = found.get("id")
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    if isinstance(name, int) and not isinstance(name, bool):
        found["id"] = str(name)
    return found


def explain(error: ValidationError) -> str:
    """The first problem that pydantic found, in one clause."""
    first = error.errors()[0]
    return ": ".join([*(str(part) for part in first["loc"]), first["msg"]])


def _join(where: str, what: str) -> str:
    return f"{where}: {what}" if where else what
