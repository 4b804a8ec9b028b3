"""Memory of this process, and the peak of a command's."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hcma_fast.errors import HcmaError

#: A child's peak includes that of the process it was forked from, at the moment of exec. So a small
#: process in between starts the command and reports what its only child used.
_RSS_PROBE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def own_peak_rss_mib() -> float:
    """Peak resident memory of this process since it began to run its program, in MiB."""
    found = status_mib("VmHWM")
    if found is not None:
        return found
    return _mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def status_mib(field: str) -> float | None:
    """A size of /proc/self/status, such as VmRSS, in MiB; None where the system has no such file.

    Unlike ``ru_maxrss``, its peak (VmHWM) leaves out the process that this one was forked from.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) / 2**10
    return None


class _MallInfo2(ctypes.Structure):
    """glibc's struct mallinfo2, malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated_mib() -> float | None:
    """What the C library's allocator has handed out and not got back, in MiB, over all its arenas.

    Unlike the resident memory this hardly moves when the allocator asks the system for more, or
    keeps what was freed (but for what its caches of the threads hold). What others take from the
    system themselves is not in it: Python's objects of up to 512 bytes, of which
    ``sys.getallocatedblocks`` tells. None where there is no glibc of 2.33 or later.
    """
    try:
        call = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # no such function; no such library (Windows)
        return None
    call.restype = _MallInfo2
    found = call()
    return float(found.uordblks + found.hblkhd) / 2**20


def peak_rss_mib(command: Sequence[str]) -> float:
    """Peak resident memory of ``command``, in MiB.

    Raises:
        HcmaError: the command failed; the end of what it wrote to stderr is in the message.
    """
    probe = [sys.executable, "-S", "-c", _RSS_PROBE, *command]
    # in a checkout, the working folder's kernels/ must not be taken for the package of that name
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(probe, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise HcmaError(
            f"the process whose memory was to be measured failed: {done.stderr.strip()[-300:]}",
            value=done.returncode,
            remedy="Run it by hand, or leave the memory out (--no-memory).",
        )
    return _mib(int(done.stdout))


def _mib(maxrss: int) -> float:
    # macOS counts in bytes, Linux in KiB
    return maxrss / (2**20 if sys.platform == "darwin" else 2**10)
