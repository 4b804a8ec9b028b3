"""Files that are opened once: what was hashed is what is read, whatever happens to their names."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcma_fast.errors import HcmaError, OutputError

_CHUNK = 2**20
_SMALL = 2**24
"""Bytes up to which a file is kept in memory from its one reading"""


class OpenedFile:
    """A regular file, held by its descriptor.

    Replacing, renaming or removing the file changes nothing here. Writing into it in place does:
    its content is read, hashed and mapped where it lies.

    Args:
        follow: whether ``path`` may be a symbolic link.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self.path = path
        # without O_NONBLOCK a named pipe would wait for somebody to write to it
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        if not follow:
            flags |= getattr(os, "O_NOFOLLOW", 0)
        self._descriptor = os.open(path, flags)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        self.size = status.st_size

    @cached_property
    def sha256(self) -> str:
        """Of the content, in hexadecimal. The file is read once for it."""
        if self.size <= _SMALL:
            return hashlib.sha256(self.content).hexdigest()
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def content(self) -> bytes:
        """All of it; for large files use :attr:`memory`."""
        return b"".join(self._chunks())

    @cached_property
    def memory(self) -> NDArray[np.uint8]:
        """(bytes,) the file mapped into memory: pages that are shared, and given back at need."""
        if not self.size:
            return np.zeros(0, np.uint8)
        # copy on write: OpenVINO takes writable arrays only, and writes to none
        return np.frombuffer(
            mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_COPY), np.uint8
        )

    @property
    def descriptor(self) -> int:
        """For a process that is to inherit it."""
        return self._descriptor

    @property
    def has_name(self) -> bool:
        """Whether the file still lies where it was opened."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return False

    def place(self, target: Path, *, plain: bool = False) -> None:
        """Let ``target`` name this file: a link to the descriptor, else a hard link, else a copy.

        Args:
            plain: no symbolic link, for libraries that resolve them.

        Raises:
            OSError: it cannot be written.
        """
        live = Path(f"/proc/self/fd/{self._descriptor}")  # Linux only
        if not plain and live.exists():
            target.symlink_to(live)
            return
        with suppress(OSError):
            os.link(os.path.realpath(self.path), target)
            if os.path.samestat(os.stat(target), os.fstat(self._descriptor)):
                return
            target.unlink()
        with target.open("wb") as file:
            for chunk in self._chunks():
                file.write(chunk)

    @contextmanager
    def named(self, *, plain: bool = False) -> Iterator[Path]:
        """A path under which a library can open this file; for ``plain`` see :meth:`place`.

        Raises:
            OutputError: there is no room for a copy, where one is needed.
        """
        live = Path(f"/proc/self/fd/{self._descriptor}")
        if not plain and live.exists():
            yield live
            return
        with private_folder({self.path.name: self}, plain=plain) as folder:
            yield folder / self.path.name

    def _chunks(self) -> Iterator[bytes]:
        offset = 0
        while chunk := os.pread(self._descriptor, _CHUNK, offset):
            offset += len(chunk)
            yield chunk


@contextmanager
def private_folder(
    files: Mapping[str, OpenedFile],
    *,
    plain: bool = False,
    origin: Path | None = None,
    origins: Mapping[str, Path] | None = None,
) -> Iterator[Path]:
    """A temporary folder with ``files``, by relative path, for libraries that insist on one.

    Args:
        plain: see :meth:`OpenedFile.place`.
        origin: the folder that errors raised inside should name instead.
        origins: files that they should name by another path than below ``origin``.

    Raises:
        OutputError: there is no room for copies, where they are needed.
    """
    with tempfile.TemporaryDirectory(prefix="hcma-fast-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        try:
            for relative, file in files.items():
                (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                file.place(folder / relative, plain=plain)
        except OSError as error:
            raise OutputError.from_os(error, folder) from error
        try:
            yield folder
        except HcmaError as error:
            if origin is None:
                raise
            shown = {str(folder / name): str(path) for name, path in (origins or {}).items()}
            shown[str(folder)] = str(origin)

            def public(text: str) -> str:
                for private, path in shown.items():
                    text = text.replace(private, path)
                return text

            value = error.value
            raise type(error)(
                public(error.what),
                value=public(value) if isinstance(value, str) else value,
                remedy=error.remedies,
            ) from error
