"""The contestants of the speed report, each in a process of its own.

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
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hcma_fast.errors import HcmaError
from hcma_fast.layout import Layout

PROMPT = "a dog to the left of a pizza on a green field"
LAYOUT = Layout(["dog", "pizza"], [(0.05, 0.3, 0.45, 0.9), (0.5, 0.5, 0.95, 0.9)])
SEED = 0

_COMMAND = "import sys; from hcma_fast.bench.contestants import serve; serve(int(sys.argv[1]))"
_TAIL = 300
"""Characters of a dead worker's output that its error quotes."""


@dataclass(frozen=True)
class Contestant:
    """A loaded model; it stays in its worker."""

    generate: Callable[[], NDArray[np.float32]]
    """makes the batch down to images; returns the final latents (B, 4, h, w)"""
    preset: str
    weights_hash: str


@dataclass(frozen=True)
class Run:
    """One generation, timed where it ran."""

    seconds: float
    latents: NDArray[np.float32]
    """(B, 4, h, w), the final ones"""


@dataclass(frozen=True)
class _Loaded:
    preset: str
    weights_hash: str


@dataclass(frozen=True)
class _Failure:
    error: Exception
    trace: str


def load_plain(model: str | Path, steps: int, batch: int) -> Contestant:
    """The plain diffusers loop.

    Raises:
        WeightsError: as in ``load_components``.
    """
    # here and below: the parent unpickles a reference to this function, and needs no diffusers
    from hcma_fast.bench.plain_loop import plain_generate
    from hcma_fast.models.weights import load_components

    parts = load_components(model)
    seeds = [SEED + i for i in range(batch)]

    def generate() -> NDArray[np.float32]:
        prompts, layouts = [PROMPT] * batch, [LAYOUT] * batch
        _, latents = plain_generate(parts, prompts, layouts, seeds, num_inference_steps=steps)
        return latents.numpy()

    return Contestant(generate, parts.preset, parts.weights_hash)


def load_ours(model: str | Path, backend: str, steps: int, batch: int) -> Contestant:
    """Our pipeline on ``backend``.

    Raises:
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
    """
    from hcma_fast.runtime.pipeline import HCMAPipeline

    pipe = HCMAPipeline.from_pretrained(model, backend=backend)

    def generate() -> NDArray[np.float32]:
        out = pipe([PROMPT] * batch, LAYOUT, seed=SEED, num_inference_steps=steps)
        return out.latents.cpu().numpy()

    return Contestant(generate, pipe.preset, pipe.weights_hash)


class Worker:
    """The parent's end of a worker process. Calling it runs its contestant once."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Contestant],
        process: subprocess.Popen[bytes],
        channel: Connection[Any, Any],
        log: IO[bytes],
    ) -> None:
        self.name, self._process, self._channel, self._log = name, process, channel, log
        loaded: _Loaded = self._ask(load)
        self.preset, self.weights_hash = loaded.preset, loaded.weights_hash

    def __call__(self) -> Run:
        """One generation. Raises what :func:`worker` raises."""
        run: Run = self._ask(None)
        return run

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
        load: picklable, such as a partial of :func:`load_plain`.

    Raises:
        HcmaError, MemoryError, OSError: what the contestant raised in its process.
        HcmaError: the process died; the end of what it wrote is in the message.
    """
    ours, theirs = Pipe()
    with ours, tempfile.TemporaryFile() as log:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                # in a checkout, the working folder's kernels/ must not be taken for the package
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                # Ctrl-C is for the parent, which ends its workers
                start_new_session=True,
            )
        try:
            yield Worker(name, load, process, ours, log)
        finally:
            process.kill()
            process.wait()


def serve(handle: int) -> None:
    """The worker: load once, then generate whenever asked. ``handle`` is its end of the pipe."""
    channel: Connection[Any, Any] = Connection(handle)
    load = channel.recv()
    asked: SimpleQueue[None] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, asked), daemon=True).start()
    try:
        contestant = load()
        channel.send(_Loaded(contestant.preset, contestant.weights_hash))
        while True:
            asked.get()
            start = time.perf_counter()
            latents = contestant.generate()
            seconds = time.perf_counter() - start
            channel.send(Run(seconds, latents))
    except (HcmaError, MemoryError, OSError) as error:  # the kinds that the command line explains
        channel.send(_Failure(error, traceback.format_exc()))


def _listen(channel: Connection[Any, Any], asked: SimpleQueue[None]) -> None:
    """Pass on requests; end the process with its parent, even a killed one, in mid-generation."""
    try:
        while True:
            asked.put(channel.recv())
    except (EOFError, OSError):
        os._exit(1)
