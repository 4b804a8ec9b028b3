"""What ``generate`` is asked for: one job per image, all checked before anything is loaded."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hcma_fast.errors import HcmaError, InputError, OutputError
from hcma_fast.files import read_file
from hcma_fast.layout import Layout

MAX_SEED = 2**63 - 1
_SLUG_LETTERS = 48
_NAME = re.compile(r"\w[\w.-]*")
_ID_BYTES, STEM_BYTES = 120, 220
_LINE_REMEDY = (
    'A line reads {"prompt": "...", "phrases": ["dog"], "boxes": [[0.1, 0.1, 0.5, 0.9]]}, and may '
    "have seed, negative_prompt and id."
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
    seed: int | None = None
    negative_prompt: str | None = None
    id: str | None = None

    def jobs(self, *, num_images: int, seed: int | None, negative: str, where: str) -> list[Job]:
        """One job per image, seeds counting up; ``seed`` and ``negative`` are the defaults.

        Raises:
            InputError: a bad layout, name or seed, with ``where`` in front.
        """
        layout = at(where, Layout, self.phrases, self.boxes)
        first = seed if self.seed is None else self.seed
        if first is None:
            first = secrets.randbelow(2**31)
        if not 0 <= first <= MAX_SEED - num_images + 1:
            raise InputError(
                _join(where, "a seed must lie between 0 and 2**63 - 1"),
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
                where=where,
            )
            for i in range(num_images)
        ]


def parse_request(data: str | bytes | dict[str, Any], where: str = "") -> Request:
    """A request from a JSON line, or from values.

    Raises:
        InputError: not JSON, a missing or unknown key, or a value of a wrong type.
    """
    try:
        if isinstance(data, dict):
            return Request.model_validate(data)
        return Request.model_validate_json(data)
    except ValidationError as error:
        raise InputError(
            _join(where, explain(error)),
            value=_input_of(error),
            remedy=_LINE_REMEDY if where else "Write plain text.",
        ) from error


def read_requests(path: Path) -> list[tuple[str, Request]]:
    """The lines of a JSONL file with their places ("line 3"); blank lines are skipped.

    Raises:
        InputError: the file cannot be read or is empty, or a line is wrong.
    """
    lines = read_file(path, "the input file").splitlines()
    found = [
        (f"line {number}", parse_request(line, f"line {number}"))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise InputError("the input file has no lines", value=str(path), remedy=_LINE_REMEDY)
    return found


def check_outputs(
    jobs: Sequence[Job], folder: Path, *, force: bool, other: str = "another --out or --seed"
) -> None:
    """Refuse two jobs with one name, and files that exist already (unless ``force``).

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
            if path.is_dir() or (path.exists() and not force):
                raise OutputError(
                    "the output exists already",
                    value=str(path),
                    remedy=f"Use --force to replace it, or {other}.",
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
