"""JSON files that are not trusted: regular files of a limited size, whose JSON is unambiguous."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from hcma_fast.errors import InputError

_REMEDY = "Check the file, or get it from its source again."


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The contents of a regular file of at most ``max_bytes``.

    It is opened before it is looked at, without waiting for a pipe's other end.

    Raises:
        OSError: it cannot be opened or read.
        InputError: it is a folder, a pipe, a device or a socket, or it is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError("this is not a regular file", value=str(path), remedy=_REMEDY)
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise InputError(
            f"this file is larger than {max_bytes} bytes", value=str(path), remedy=_REMEDY
        )
    return content


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        InputError: it is not JSON, is nested too deeply, has a key twice in one object, or holds a
            number that is not finite or has too many digits.
    """
    try:
        return json.loads(
            content.decode(),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_not_finite,
        )
    except InputError:
        raise
    except RecursionError as error:
        raise InputError("this JSON is nested too deeply", remedy=_REMEDY) from error
    except ValueError as error:
        raise InputError(f"this is not JSON ({error})", remedy=_REMEDY) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise InputError("this JSON has a key twice", value=key[:80], remedy=_REMEDY)
        values[key] = value
    return values


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_finite(text)


def _not_finite(text: str) -> NoReturn:
    raise InputError("this JSON has a number that is not finite", value=text[:80], remedy=_REMEDY)
