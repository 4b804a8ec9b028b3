"""Errors of hcma-fast: each says what was wrong, with which value, and what to do about it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

if TYPE_CHECKING:
    from pathlib import Path

Audience = Literal["python", "command", "http"]
"""Who reads an error: a caller of the Python API, of the command line, or of the HTTP API."""

_MAX_MESSAGE = 500
_MAX_VALUE = 160
_MIN_FAULT = 100


@dataclass(frozen=True)
class Remedy:
    """What to do, in the words of each audience: arguments, options, or fields.

    An audience without words of its own reads those of ``python``.
    """

    python: str
    command: str | None = None
    http: str | None = None

    def for_audience(self, audience: Audience) -> str:
        """The words for one audience."""
        own: str | None = getattr(self, audience)
        return own or self.python


class HcmaError(Exception):
    """Base of every error that hcma-fast raises on purpose.

    Args:
        what: what is wrong, one clause.
        value: the offending value, shown as Python writes it; a long one is cut.
        remedy: what the user can do; a :class:`Remedy` where the audiences need different words.
    """

    exit_code: ClassVar[int] = 1
    request: int | None = None
    """number, from 0, of the request that it is about, where many were given at once"""

    def __init__(self, what: str, *, value: object = None, remedy: str | Remedy) -> None:
        self.what, self.value = what, value
        self.remedies = Remedy(remedy) if isinstance(remedy, str) else remedy
        super().__init__(what)

    @property
    def remedy(self) -> str:
        """What a caller of the Python API can do."""
        return self.remedies.python

    def __str__(self) -> str:
        return self.message()

    def message(self, audience: Audience = "python") -> str:
        """Fault, value and remedy in one line of at most 500 characters."""
        value = "" if self.value is None else f" (got {_shown(self.value)})"
        remedy = _one_line(self.remedies.for_audience(audience))
        room = max(_MAX_MESSAGE - len(value) - len(remedy) - 2, _MIN_FAULT)
        return f"{_cut(_one_line(self.what), room)}{value}. {remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        # exceptions pickle their positional arguments only, and worker processes pickle errors
        made = functools.partial(type(self), self.what, value=self.value, remedy=self.remedies)
        return made, (), {"request": self.request}

    def at(self, where: str) -> Self:
        """The same error, which says where: "line 3"."""
        found = type(self)(f"{where}: {self.what}", value=self.value, remedy=self.remedies)
        found.request = self.request
        return found

    def of_request(self, number: int) -> Self:
        """The same error, which says to which of many requests it belongs."""
        found = self.at(f"request {number}")
        found.request = number
        return found


LOWER_STEP = Remedy("Lower eta0 or guidance_scale.", "Lower --eta0 or --guidance-scale.")
"""What to do about a latent that diverged."""


class UsageError(HcmaError):
    """A wrong option or combination of options (exit code 2)."""

    exit_code = 2


class SettingsError(UsageError, ValueError):
    """A setting that is out of its range, or of a wrong type (exit code 2)."""


class DivergenceError(UsageError):
    """A latent or an image that is not finite, by the settings or the weights (exit code 2)."""


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


def words_of(error: Exception) -> str:
    """Its kind and ``str(error)``; its kind alone where what it holds cannot be written."""
    try:
        return f"{type(error).__name__} {error}"
    except Exception:  # it holds an integer of too many digits, or something without words
        return type(error).__name__


def _shown(value: object) -> str:
    """``repr(value)`` in one line of printable characters, cut in the middle."""
    try:
        text = repr(value)
    except Exception:  # too deep, an integer of too many digits, or a class with a faulty repr
        text = f"<{type(value).__name__}>"
    return _cut(_one_line(text), _MAX_VALUE)


def printable(text: str) -> str:
    """``text`` as one line that a terminal may show: no control characters, at most 500 letters."""
    return _cut(_one_line(text), _MAX_MESSAGE)


def _one_line(text: str) -> str:
    """Line breaks become spaces, and other control characters escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in " ".join(text.split())
    )


def _cut(text: str, room: int) -> str:
    """``text`` in at most ``room`` characters: both ends of a long one."""
    if len(text) <= room:
        return text
    head = (room - 3) * 2 // 3
    return f"{text[:head]}...{text[len(text) - (room - 3 - head) :]}"
