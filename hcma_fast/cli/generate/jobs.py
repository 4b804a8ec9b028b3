"""The images that ``generate`` makes: one job each, all checked before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hcma_fast.errors import HcmaError, InputError, OutputError
from hcma_fast.files import read_json
from hcma_fast.runtime.request import Request

_SLUG_LETTERS = 48
_SIDECAR_BYTES = 2**20
_NAME = re.compile(r"\w[\w.-]*")
_ID_BYTES, STEM_BYTES = 120, 220
Found = TypeVar("Found")


@dataclass(frozen=True)
class Job:
    """One image to make."""

    stem: str
    """file name without suffix"""
    request: Request
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

    def with_seed(self, seed: int) -> Job:
        """The same image with another seed."""
        request = self.request.model_copy(update={"seed": seed})
        return replace(self, request=request, stem=f"{self.name}-{seed}")


def jobs_of(
    request: Request, *, num_images: int, name: str | None, where: str = "", drawn: bool = False
) -> list[Job]:
    """One job per image, seeds counting up.

    Args:
        name: of the files; by default from the prompt.

    Raises:
        InputError: a bad name, or seeds beyond the last one, with ``where`` in front.
    """
    stem = at(where, check_name, name) if name is not None else slug(request.prompt)
    for text in (request.prompt, request.negative_prompt, *request.layout.phrases):
        at(where, _check_unicode, text)
    seeds = range(request.seed, request.seed + num_images)
    first = Job(f"{stem}-{request.seed}", request, where, stem, drawn)
    return [first, *(at(where, first.with_seed, seed) for seed in seeds[1:])]


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


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "this text is not valid Unicode", value=text, remedy="Write it in UTF-8."
        ) from error


def at(where: str, call: Callable[..., Found], *arguments: object) -> Found:
    """``call(*arguments)``; an error that it raises says ``where``, if that is not empty."""
    try:
        return call(*arguments)
    except HcmaError as error:
        if not where:
            raise
        raise error.at(where) from error
