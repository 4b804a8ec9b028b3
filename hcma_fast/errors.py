"""Errors of hcma-fast: each says what was wrong, with which value, and what to do about it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from pathlib import Path


class HcmaError(Exception):
    """Base of every error that hcma-fast raises on purpose.

    Args:
        what: what is wrong, one clause.
        value: the offending value, shown verbatim when given.
        remedy: what the user can do.
    """

    exit_code: ClassVar[int] = 1
    request: int | None = None
    """number, from 0, of the request that it is about, where many were given at once"""

    def __init__(self, what: str, *, value: object = None, remedy: str) -> None:
        self.what, self.value, self.remedy = what, value, remedy
        shown = "" if value is None else f" (got {value!r})"
        super().__init__(f"{what}{shown}. {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        # exceptions pickle their positional arguments only, and worker processes pickle errors
        made = functools.partial(type(self), self.what, value=self.value, remedy=self.remedy)
        return made, (), {"request": self.request}

    def at(self, where: str) -> Self:
        """The same error, which says where: "line 3"."""
        found = type(self)(f"{where}: {self.what}", value=self.value, remedy=self.remedy)
        found.request = self.request
        return found

    def of_request(self, number: int) -> Self:
        """The same error, which says to which of many requests it belongs."""
        found = self.at(f"request {number}")
        found.request = number
        return found


class UsageError(HcmaError):
    """A wrong option or combination of options (exit code 2)."""

    exit_code = 2


class DivergenceError(UsageError):
    """Settings that made the latent infinite: eta0 or the guidance is too large (exit code 2)."""


class InputError(HcmaError, ValueError):
    """A bad layout, prompt or input file (exit code 3)."""

    exit_code = 3


class WeightsError(HcmaError):
    """A missing, corrupt or refused checkpoint (exit code 3)."""

    exit_code = 3


class OutputError(HcmaError):
    """A file or folder that cannot be written, or that would be overwritten (exit code 3)."""

    exit_code = 3

    @classmethod
    def from_os(cls, error: OSError, path: Path | None = None) -> OutputError:
        """What the system says of ``path``, by default the path that it names itself."""
        shown = str(path) if path is not None else error.filename
        return cls(
            f"cannot read or write here: {error.strerror or error}",
            value=shown,
            remedy="Check the path, its permissions and the free space, or choose another.",
        )


class BackendError(HcmaError):
    """A backend that is missing or does not support what was asked (exit code 4)."""

    exit_code = 4


class DeviceMemoryError(HcmaError):
    """Out of memory on host or device (exit code 5)."""

    exit_code = 5


class EngineError(HcmaError):
    """A stale, incomplete or tampered engine folder (exit code 6)."""

    exit_code = 6
