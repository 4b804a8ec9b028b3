"""Errors of hcma-fast: each says what was wrong, with which value, and what to do about it."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MESSAGE_LETTERS = 500
"""Longest message that is printed, in characters."""
_REMEDY_LETTERS, _VALUE_LETTERS, _LEAST_LETTERS = 280, 200, 60
_ARGUMENT = re.compile(r"\{(\w+)(?:=([^{}]*))?\}")

ArgumentNames: TypeAlias = "Callable[[str, str | None], str]"
"""(argument of the Python API, value if any) -> how the one who asked writes it."""


def python_argument(name: str, value: str | None) -> str:
    """``backend="eager"`` or, without a value, ``backend``."""
    if value is None:
        return name
    bare = value in ("True", "False", "None") or value[:1] in "0123456789([.-"
    return f"{name}={value if bare else repr(value)}".replace("'", '"')


def printable(text: str, letters: int = MESSAGE_LETTERS) -> str:
    """``text`` in one line of at most ``letters``: no control characters, the middle left out.

    Terminals act on control characters, so text from a file must not print them.
    """
    if len(text) > 8 * letters:
        text = text[: 4 * letters] + text[-4 * letters :]
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    if len(line) <= letters:
        return line
    tail = letters // 3
    return f"{line[: letters - tail - 3]}...{line[-tail:]}"


def _representation(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # deep lists, and integers of thousands of digits
        return f"a value of the type {type(value).__name__}"


class HcmaError(Exception):
    """Base of every error that hcma-fast raises on purpose.

    Args:
        what: what is wrong, one clause.
        value: the offending value, shown when given.
        remedy: what the user can do.

    ``{backend=eager}`` or ``{backend}`` in ``what`` and ``remedy`` names an argument: the message
    writes it in the words of whoever asked, ``backend="eager"`` or ``--backend eager``.
    """

    exit_code: ClassVar[int] = 1
    request: int | None = None
    """number, from 0, of the request that it is about, where many were given at once"""

    def __init__(self, what: str, *, value: object = None, remedy: str) -> None:
        self.what, self.value, self.remedy = what, value, remedy
        super().__init__(self.message())

    def message(self, argument: ArgumentNames = python_argument) -> str:
        """What is wrong, the value and the remedy: one line of at most 500 characters."""

        def words(text: str) -> str:
            return _ARGUMENT.sub(lambda found: argument(found[1], found[2]), text)

        remedy = printable(words(self.remedy), _REMEDY_LETTERS)
        what = printable(words(self.what))
        room = MESSAGE_LETTERS - len(remedy) - len(". ")
        shown = ""
        if self.value is not None:
            most = min(_VALUE_LETTERS, max(_LEAST_LETTERS, room - len(what) - len(" (got )")))
            shown = f" (got {printable(_representation(self.value), most)})"
        return f"{printable(what, room - len(shown))}{shown}. {remedy}"

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
