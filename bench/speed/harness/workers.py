"""Contestants of a benchmark, each in a process of its own.

A user's process holds one model. In a shared one the thread pools of torch and ONNX Runtime take
the cores from each other, and the allocators are shared. So each contestant loads in a worker,
which then waits, blocked on a pipe, while others run.

A plain subprocess rather than multiprocessing: its output goes to a file, so that a library that
prints cannot fill a pipe, and that file says why a worker died. Neither the parent's main module
nor its sys.path matters to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hcma_fast.bench.shared.clocks import Clocks, read_clocks
from hcma_fast.bench.shared.memory import own_peak_rss_mib
from hcma_fast.errors import HcmaError

_COMMAND = (
    "import sys; from hcma_fast.bench.speed.harness.workers import serve; serve(int(sys.argv[1]))"
)
_TAIL = 300
"""Characters of a dead worker's output that its error quotes."""


@dataclass(frozen=True)
class Contestant:
    """What a worker has loaded; it stays there."""

    generate: Callable[[], NDArray[np.float32]]
    """what is timed; returns what contestants are compared by, such as the final latents"""
    preset: str
    weights_hash: str
    device: str = "cpu"
    figures: Callable[[], dict[str, float]] = dict
    """what else is to be told of the last call; not timed"""


@dataclass(frozen=True)
class Run:
    """One call of a contestant, timed where it ran."""

    seconds: float
    result: NDArray[np.float32]
    peak_rss_mib: float = 0.0
    """of the worker so far"""
    device_peak_mib: float | None = None
    """of torch's allocator on the GPU so far; engines with memory of their own are not in it"""
    figures: dict[str, float] = field(default_factory=dict)
    clocks: Clocks = field(default_factory=Clocks)
    """right after the call"""


@dataclass(frozen=True)
class Loaded:
    """What a worker has loaded, and how long it took from the start of the process on."""

    preset: str
    weights_hash: str
    load_s: float = 0.0


@dataclass(frozen=True)
class _Failure:
    error: Exception
    trace: str


class Worker:
    """The parent's end of a worker process. Calling it runs its contestant once."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Contestant],
        process: subprocess.Popen[bytes],
        channel: Connection[Any, Any],
        log: IO[bytes],
        started: float,
    ) -> None:
        self.name, self._process, self._channel, self._log = name, process, channel, log
        loaded: Loaded = self._ask(load)
        # as the parent sees it: with the start of Python and all imports
        self.loaded = replace(loaded, load_s=time.perf_counter() - started)

    def __call__(self) -> Run:
        """One run. Raises what :func:`worker` raises."""
        run: Run = self._ask(None)
        return run

    def kill(self) -> None:
        """End the process at once, as the system would; the next call says that it died."""
        self._process.kill()

    def _ask(self, request: Callable[[], Contestant] | None) -> Any:
        try:
            self._channel.send(request)
            reply = self._channel.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(reply, _Failure):
            reply.error.add_note(f"In the process of {self.name}:\n{reply.trace}")
            raise reply.error
        return reply

    def _died(self) -> HcmaError:
        code = self._process.wait()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4 * _TAIL))
        words = self._log.read().decode(errors="replace").strip()[-_TAIL:]
        return HcmaError(
            f"the process of {self.name} died: {words or 'it said nothing'}",
            value=code,
            remedy="If the system killed it (-9), memory ran out: use a smaller batch or fewer "
            "backends.",
        )


@contextmanager
def worker(name: str, load: Callable[[], Contestant]) -> Iterator[Worker]:
    """A process that has loaded the contestant; it is gone when the block ends, however it ends.

    Args:
        name: what errors call it.
        load: picklable, such as a partial of ``contestants.load_plain``.

    Raises:
        HcmaError, MemoryError, OSError: what the contestant raised in its process.
        HcmaError: the process died; the end of what it wrote is in the message.
    """
    ours, theirs = Pipe()
    with ours, tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                # In a checkout, the working folder's kernels/ must not be taken for the package.
                # float32 is float32 for everybody: torch rounds convolutions to TF32 by default,
                # ONNX Runtime all products, our engines none, and rows would be of unequal work.
                env={**os.environ, "PYTHONSAFEPATH": "1", "NVIDIA_TF32_OVERRIDE": "0"},
                # Ctrl-C is for the parent, which ends its workers
                start_new_session=True,
            )
        try:
            yield Worker(name, load, process, ours, log, started)
        finally:
            process.kill()
            process.wait()


def serve(handle: int) -> None:
    """The worker: load once, then run whenever asked. ``handle`` is its end of the pipe."""
    channel: Connection[Any, Any] = Connection(handle)
    load = channel.recv()
    asked: SimpleQueue[None] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, asked), daemon=True).start()
    try:
        contestant = load()
        channel.send(Loaded(contestant.preset, contestant.weights_hash))
        timed = _cuda_timed if contestant.device.startswith("cuda") else _timed
        while True:
            asked.get()
            channel.send(timed(contestant))
    except (HcmaError, MemoryError, OSError) as error:  # the kinds that the command line explains
        channel.send(_Failure(error, traceback.format_exc()))


def _timed(contestant: Contestant) -> Run:
    start = time.perf_counter()
    result = contestant.generate()
    seconds = time.perf_counter() - start
    clocks = read_clocks()  # before the figures, which may take a while
    return Run(seconds, result, own_peak_rss_mib(), None, contestant.figures(), clocks)


def _cuda_timed(contestant: Contestant) -> Run:
    """By events on the device, around all that was queued, on other streams too."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(contestant.device)
    begin.record()
    result = contestant.generate()
    torch.cuda.synchronize(contestant.device)
    end.record()
    end.synchronize()
    # nvidia-smi counts the devices in another order, and those that are hidden from torch too
    uuid = torch.cuda.get_device_properties(contestant.device).uuid
    clocks = read_clocks(f"GPU-{uuid}")
    peak = torch.cuda.max_memory_reserved(contestant.device) / 2**20
    seconds = begin.elapsed_time(end) / 1e3
    return Run(seconds, result, own_peak_rss_mib(), peak, contestant.figures(), clocks)


def _listen(channel: Connection[Any, Any], asked: SimpleQueue[None]) -> None:
    """Pass on requests; end the process with its parent, even a killed one, in mid-generation."""
    try:
        while True:
            asked.put(channel.recv())
    except (EOFError, OSError):
        os._exit(1)
