"""Read a checkpoint's small files: regular files only, of bounded size, JSON with no surprises."""

from __future__ import annotations

import logging
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from hcma_fast import files
from hcma_fast.errors import WeightsError

CONFIG_BYTES = 2**20
"""Largest config; real ones have a few KiB"""
VOCABULARY_BYTES = 2**25
"""Largest vocabulary; CLIP's tokenizer.json has 3.6 MiB"""
_LFS_POINTER = b"version https://git-lfs"
_WHAT = "this file of the checkpoint"
_SHOWN = 80


def files_in(folder: Path) -> list[Path]:
    """The entries of a folder in order, without hidden ones: macOS leaves ``._config.json``.

    Raises:
        WeightsError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from error


def open_file(path: Path) -> BinaryIO:
    """Open a regular file that is no Git LFS pointer; a fifo would block, a device never end.

    Raises:
        WeightsError.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        # a fifo could take the file's place between the two calls: never wait for a writer
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags) if regular else None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if descriptor is None:
        raise WeightsError(
            "this entry of the checkpoint is not a regular file",
            value=str(path),
            remedy="Download or build the checkpoint again.",
        )
    file = os.fdopen(descriptor, "rb")
    start = file.read(len(_LFS_POINTER))
    file.seek(0)
    if start == _LFS_POINTER:
        file.close()
        raise WeightsError(
            "this file is a Git LFS pointer: the file itself was not downloaded",
            value=str(path),
            remedy="Run `git lfs pull` in the checkpoint's repository, or download the file again.",
        )
    return file


def read_text(path: Path, limit: int = CONFIG_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        WeightsError: it cannot be read, is larger than ``limit`` bytes or in another encoding.
    """
    open_file(path).close()
    return files.read_text(path, _WHAT, limit=limit, kind=WeightsError)


def read_json(path: Path, limit: int = CONFIG_BYTES) -> Any:
    """The value of a JSON file; see :func:`hcma_fast.files.parse_json`.

    Raises:
        WeightsError: it cannot be read, or is no such file.
    """
    return files.parse_json(read_text(path, limit), _WHAT, kind=WeightsError, source=str(path))


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        WeightsError: it cannot be read, or holds something else.
    """
    data = read_json(path, limit)
    if not isinstance(data, dict):
        raise WeightsError(
            "this file of the checkpoint is not a JSON object",
            value=str(path),
            remedy="It is damaged: download or build the checkpoint again.",
        )
    return data


def shorten(value: object) -> str:
    """``value`` as text of at most 80 letters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def first_line(error: Exception) -> str:
    """One line that says what ``error`` is: libraries' messages run over pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


@lru_cache(maxsize=256)
def tell_once(message: str) -> None:
    """Log a warning, the first time that a process has this message."""
    logging.getLogger("hcma_fast").warning(message)


def _unreadable(path: Path, error: Exception) -> WeightsError:
    reason = error.strerror if isinstance(error, OSError) else None
    return WeightsError(
        f"cannot read this entry of the checkpoint: {reason or shorten(str(error))}",
        value=str(path),
        remedy="Check that the file is there and may be read, or get the checkpoint again.",
    )
