"""Which files of an engine folder may be deleted: those that its manifest lists, and no others."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcma_fast.errors import InputError, OutputError
from hcma_fast.export.manifest import MANIFEST_FILE, is_inside, manifest_values
from hcma_fast.specs import GRAPH_NAMES, STEP_NAMES

_SHOWN = 5
_GRAPH = f"({'|'.join((*GRAPH_NAMES, *STEP_NAMES))})"
#: what a build writes, for a folder whose manifest is not written yet, or is damaged
_BUILT = re.compile(
    rf"{re.escape(MANIFEST_FILE)}|weights\.bin|{_GRAPH}\.(onnx|engine|pt2)"
    rf"|\.{_GRAPH}\.engine\.\d+\.part"
    rf"|\.{_GRAPH}\.pt2\.\w+/.*"  # torch's own files, while it compiles
    r"|tokenizer/((tokenizer|tokenizer_config|vocab|special_tokens_map|added_tokens)\.json"
    r"|merges\.txt|)"
)
RETIRED = "engine"
"""In the folder to which a build moves the engine that it replaces"""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Graph(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    file: str
    sha256: Sha256


class _Listing(BaseModel):
    """What manifests of all formats have in common."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    format: int = Field(ge=1)
    backend_version: str
    weights_hash: str
    key: str
    graphs: dict[str, _Graph]
    files: dict[str, Sha256]


def engine_files(folder: Path) -> list[str]:
    """Relative names of all files of an engine folder, of any format.

    Raises:
        InputError: the manifest is missing, or is not one of an engine folder; or the folder holds
            something that the manifest does not list.
        OutputError: the folder cannot be read.
    """
    listed = _listed(folder)
    if listed is None:
        with _typed(folder):
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
        raise _refuse("this is not an engine folder", folder, names)
    folders = {f"{parent}/" for name in listed for parent in PurePosixPath(name).parents}
    return _only(folder, lambda name: name in listed or name in folders or name == MANIFEST_FILE)


def has_listing(folder: Path) -> bool:
    """Has the folder the manifest of an engine folder, of any format?"""
    return _listed(folder) is not None


def built_files(folder: Path) -> list[str]:
    """Relative names of all files of a folder that a build did not finish, or that was damaged.

    Raises:
        InputError: it holds something that no build writes.
        OutputError: the folder cannot be read.
    """
    return _only(folder, lambda name: _BUILT.fullmatch(name) is not None)


def remove_engine(folder: Path) -> None:
    """Delete an engine folder, whole or not, and nothing that is not of an engine.

    Raises:
        InputError: it holds something else; then nothing is deleted.
        OutputError: it cannot be read or written.
    """
    if folder.is_symlink():
        raise InputError(
            "this is a link, whose target is not deleted",
            value=str(folder),
            remedy="Delete the link yourself, or give the folder that it points to.",
        )
    with _typed(folder):
        # the build puts the engine that it replaces into a folder of its own
        retired = os.listdir(folder) == [RETIRED]
    if retired:
        remove_engine(folder / RETIRED)
        names: list[str] = []
    else:
        names = engine_files(folder) if has_listing(folder) else built_files(folder)
    with _typed(folder):
        # the manifest last: what a killed process leaves is recognised by it
        for name in sorted(names, key=lambda name: name == MANIFEST_FILE):
            (folder / name).unlink(missing_ok=True)
        # a folder that is not empty by now stays, and is an error
        for place, _, _ in os.walk(folder, topdown=False):
            os.rmdir(place)


def _listed(folder: Path) -> set[str] | None:
    try:
        names = set(_Listing.model_validate(manifest_values(folder)).files)
    except (OSError, InputError, ValidationError):
        return None
    return names if all(map(is_inside, names)) else None


def _only(folder: Path, known: Callable[[str], bool]) -> list[str]:
    """Names of the files of ``folder``, all of which must be ``known``; its folders too."""
    with _typed(folder):
        unknown = list(itertools.islice((n for n in _entries(folder) if not known(n)), _SHOWN + 1))
        names = [name for name in _entries(folder) if not name.endswith("/")]
    if unknown:
        raise _refuse("this folder holds what is not of an engine", folder, unknown)
    return names


def _entries(folder: Path) -> Iterator[str]:
    """Relative names of all that is below ``folder``; those of folders end with a slash."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        inside = Path(place).relative_to(folder)
        for name in sorted(folders):
            is_link = os.path.islink(os.path.join(place, name))
            yield (inside / name).as_posix() + ("" if is_link else "/")
        for name in sorted(files):
            yield (inside / name).as_posix()


def _refuse(problem: str, folder: Path, names: Sequence[str]) -> InputError:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return InputError(
        f"{problem}, so it is not replaced or deleted",
        value=f"{folder}: {shown}" if names else str(folder),
        remedy="Choose another folder with --out, or move these files away.",
    )


@contextmanager
def _typed(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError.from_os(error, folder) from error
