"""How a program of the package ends: an error in one line, an exit code of design.md section 5."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hcma_fast.errors import DeviceMemoryError, HcmaError, OutputError, printable

DEBUG_VARIABLE = "HCMA_FAST_DEBUG"
INTERRUPTED = 130
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def print_error_line(message: str) -> None:
    """``error: message`` on stderr, in one line of at most 500 characters."""
    print("error:", printable(message), file=sys.stderr, flush=True)


@contextmanager
def clean_stop() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as SystemExit, so that cleaning up takes place.

    The exit code is 128 + the signal, as a shell says it. Signals that the parent ignores (nohup)
    stay ignored; outside of the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def stop(number: int, _: object) -> None:
        # a second signal must not stop the cleaning up
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    try:
        for number, handler in before.items():
            if handler is signal.SIG_DFL:
                signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_program(main: Callable[[], object], say: Callable[[str], None] = print_error_line) -> int:
    """Call ``main`` and return the exit code; whatever it raises is said in one line.

    Args:
        say: prints an error's message.
    """
    try:
        with clean_stop():
            main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _report(error, say)
    return 0


def _report(error: Exception, say: Callable[[str], None]) -> int:
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        traceback.print_exception(error)
    known = _as_known(error)
    if known is None:
        say(
            f"this is a bug in hcma-fast: {type(error).__name__}: {error}. Please report it, "
            f"with the traceback that {DEBUG_VARIABLE}=1 in the environment shows."
        )
        return 1
    say(known.message("command"))
    return known.exit_code


def _as_known(error: Exception) -> HcmaError | None:
    if isinstance(error, HcmaError):
        return error
    lower = "Lower --batch-size (in training --batch or --micro-batch)."
    if isinstance(error, MemoryError):
        return DeviceMemoryError("the host is out of memory", remedy=lower)
    # torch's, by name: programs that do without torch must not import it for this
    if type(error).__name__ == "OutOfMemoryError":
        return DeviceMemoryError("the device is out of memory", remedy=lower)
    # an OSError without errno comes from a library's own check, so it says nothing of the disk
    if isinstance(error, OSError) and error.errno is not None:
        return OutputError.from_os(error)
    return None
