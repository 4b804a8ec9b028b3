"""Files that are read whole, and written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from hcma_fast.errors import InputError, OutputError

PARTIAL_NAME = re.compile(r"\.(?P<name>.+)\.\d+\.part")
"""Of a file or folder that a process is writing, or left: ``.NAME.PID.part``"""


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write ``path`` by a temporary name (``.NAME.PID.part``), synced and renamed.

    Args:
        write: puts the content into the open file.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError.from_os(error, path) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_folder(folder: Path, save: Callable[[Path], object]) -> None:
    """Put into ``folder`` the files that ``save`` writes, each whole or not at all.

    A library's ``save_pretrained`` writes in place, so a run that is killed meanwhile would leave
    half a file under the name of a whole one. Here it writes into a folder beside
    (``.NAME.PID.part``), whose files are synced and then renamed, one by one, over those of the
    same name.

    Args:
        save: puts files, without sub-folders, into the empty folder that it is given.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    with _beside(folder) as partial:
        folder.mkdir(exist_ok=True)
        save(partial)
        sync_folder(partial)
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)


def append_line(path: Path, line: str) -> None:
    """Write ``line`` and a line's end to the end of ``path``.

    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OutputError.from_os(error, path) from error


def make_folder(path: Path) -> None:
    """Make ``path`` and its parents.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError.from_os(error, path) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside ``path`` (``.NAME.PID.part``), which is synced and renamed at the end.

    What fails inside leaves nothing; so does a ``path`` that is there and not empty.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    with _beside(path) as partial:
        yield partial
        sync_folder(partial)
        partial.rename(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which is gone at the end; what fails inside is typed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        yield partial
    except shutil.Error as error:
        raise OutputError(
            f"files cannot be copied ({error})",
            value=str(path),
            remedy="Check the path, its permissions and the free space, or choose another.",
        ) from error
    except OSError as error:
        raise OutputError.from_os(error, path) from error
    except SafetensorError as error:
        # its writer does not raise the system's error, but quotes it
        raise OutputError(
            f"cannot write here: {error}",
            value=str(path),
            remedy="Check the free space, or choose another folder.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """fsync every file below ``folder``, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_file(path: Path, what: str) -> bytes:
    """The contents of ``path``.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {what}: {error.strerror}", value=str(path), remedy="Check the path."
        ) from error
