"""Files that are read whole, and written whole or not at all."""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from hcma_fast.errors import HcmaError, InputError, OutputError

FILE_BYTES = 2**26
"""Most bytes of a text or JSON file that is read whole, unless its reader says otherwise."""
MAX_DEPTH = 64
"""Most levels of lists and objects in a JSON text."""
_MAX_DIGITS = 40
_SHOWN_LETTERS = 80
_UTF8_REMEDY = "Save it as UTF-8, in PowerShell for example with Out-File -Encoding utf8."

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


def write_file(path: Path, content: bytes) -> None:
    """Write ``path`` as :func:`write_whole` does.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full.
    """
    write_whole(path, lambda file: file.write(content))


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


def read_file(
    path: Path, what: str, *, limit: int = FILE_BYTES, kind: type[HcmaError] = InputError
) -> bytes:
    """The contents of a regular file; never waits for a named pipe or a device.

    Args:
        what: what the file is, such as "the layout file", for the message.
        limit: most bytes that it may have.
        kind: of the error.

    Raises:
        HcmaError: of ``kind``. It cannot be read, is no regular file, or is too large.
    """
    try:
        # non-blocking: to open a named pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise kind(
                    f"{what} must be a file, and this is a pipe, a socket or a device",
                    value=str(path),
                    remedy="Write its contents to a file, and give that.",
                )
            content = file.read(limit + 1)
    except HcmaError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise kind(
            f"cannot read {what}: {getattr(error, 'strerror', None) or error}",
            value=str(path),
            remedy="Check the path.",
        ) from error
    if len(content) > limit:
        raise kind(
            f"{what} has more than {limit // 2**20} MiB",
            value=str(path),
            remedy="Is it the right file? If so, split it.",
        )
    return content


def read_text(
    path: Path, what: str, *, limit: int = FILE_BYTES, kind: type[HcmaError] = InputError
) -> str:
    """The text of a UTF-8 file, without a byte order mark. See :func:`read_file`.

    Raises:
        HcmaError: of ``kind``. See :func:`read_file`; or it is UTF-16, UTF-32, or no UTF-8.
    """
    content = read_file(path, what, limit=limit, kind=kind)
    return decode_text(content, what, kind=kind, source=str(path))


def read_json(
    path: Path, what: str, *, limit: int = FILE_BYTES, kind: type[HcmaError] = InputError
) -> Any:
    """The JSON value in a UTF-8 file. See :func:`read_text` and :func:`parse_json`.

    Raises:
        HcmaError: of ``kind``.
    """
    text = read_text(path, what, limit=limit, kind=kind)
    return parse_json(text, what, kind=kind, source=str(path))


def decode_text(
    data: bytes, what: str, *, kind: type[HcmaError] = InputError, source: str | None = None
) -> str:
    """``data`` as UTF-8 text, without a byte order mark.

    Args:
        source: what the message shows as the value; default the start of the text.

    Raises:
        HcmaError: of ``kind``. It is UTF-16 or UTF-32, which the message names, or no UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = _encoding(data) or f"not valid UTF-8 (line {line})"
        raise kind(
            f"{what} is {problem}", value=source or data[:_SHOWN_LETTERS], remedy=_UTF8_REMEDY
        ) from error
    if "\0" in text:
        raise kind(
            f"{what} is {_encoding(data) or 'no text'}",
            value=source or data[:_SHOWN_LETTERS],
            remedy=_UTF8_REMEDY,
        )
    return text


def _encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32, if that is what ``data`` looks like."""
    for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        if data.startswith(mark):
            return "UTF-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    # without a mark: the text of our formats starts with an ASCII character
    first = data[:2]
    return "UTF-16" if len(first) == 2 and (first[0] == 0) != (first[1] == 0) else None


def parse_json(
    text: str | bytes, what: str, *, kind: type[HcmaError] = InputError, source: str | None = None
) -> Any:
    """The value of a JSON text whose objects name each key once and whose numbers are finite.

    Args:
        what: what the text is, such as "line 3", for the message.
        source: what the message shows as the value; default the start of the text.

    Raises:
        HcmaError: of ``kind``. It is no JSON, names a key twice, holds a number that is not finite
            or an integer of more than 40 digits, or nests more than 64 levels.
    """
    if isinstance(text, bytes):
        text = decode_text(text, what, kind=kind, source=source)
    text = text.removeprefix("\ufeff")
    try:
        data = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if (
            text.count("[") + text.count("{") > MAX_DEPTH
            and isinstance(data, dict | list)
            and _is_deep(data)
        ):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        problem = f"nests more than {MAX_DEPTH} levels" if deep else f"must be JSON: {error}"
        raise kind(
            f"{what} {problem}", value=source or text[:_SHOWN_LETTERS], remedy="Write valid JSON."
        ) from error
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:_SHOWN_LETTERS]!r} is there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {number[:_SHOWN_LETTERS]} is not finite")
    return value


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(MAX_DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def is_file(path: str | Path) -> bool:
    """Is there a regular file? No for a name that is too long, or that cannot be a name."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Is there a folder? No for a name that is too long, or that cannot be a name."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False
