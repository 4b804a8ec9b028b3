"""Our calls give the same result whatever a program has set in torch; and a fork is refused.

The state of torch belongs to the program that calls us: it may compute in float64 by default, on
another default device, under autocast or in inference mode. We set torch's own defaults for the
time of a call, and put back what was there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from hcma_fast.errors import UsageError

_DEVICE_TYPES = ("cpu", "cuda", "mps")


@contextmanager
def neutral_torch() -> Iterator[None]:
    """torch's defaults inside: float32, the CPU, gradients, no autocast, no inference mode.

    Also a decorator of functions, but not of generators, which would leave it open between two
    items. The deterministic algorithms of torch stay as they are: they are a wish that we can meet.

    Raises:
        UsageError: this process was forked from one in which we had run already.
    """
    check_process()
    with ExitStack() as stack:
        stack.enter_context(_float32())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in _DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        yield


class _ProcessWide:
    """What torch keeps once for all threads: the first of our calls sets it, the last puts it back.

    The precision of float32 products is among it: "medium" computes them in bfloat16 on a CPU.
    """

    def __init__(self) -> None:
        self._lock, self._calls = threading.Lock(), 0
        self._dtype, self._precision = torch.float32, "highest"

    def enter(self) -> None:
        with self._lock:
            self._calls += 1
            if self._calls > 1:
                return
            self._dtype = torch.get_default_dtype()
            self._precision = torch.get_float32_matmul_precision()
            if self._dtype != torch.float32:
                torch.set_default_dtype(torch.float32)
            if self._precision != "highest":
                torch.set_float32_matmul_precision("highest")

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls:
                return
            if self._dtype != torch.float32:
                torch.set_default_dtype(self._dtype)
            if self._precision != "highest":
                torch.set_float32_matmul_precision(self._precision)


_process_wide = _ProcessWide()


@contextmanager
def _float32() -> Iterator[None]:
    _process_wide.enter()
    try:
        yield
    finally:
        _process_wide.leave()


class _Owner:
    """The process in which we ran first: threads of torch and ONNX Runtime live there alone."""

    pid: int | None = None


def check_process() -> None:
    """Refuse to compute in a child that was forked from a process in which we had run.

    Threads do not survive a fork, and a computation that waits for them never ends.

    Raises:
        UsageError: it is such a child.
    """
    here = os.getpid()
    if _Owner.pid is None:
        _Owner.pid = here
    elif _Owner.pid != here:
        raise UsageError(
            "this process was forked after its parent had loaded or run a pipeline, whose threads "
            "do not exist here",
            value=f"process {here}, forked from {_Owner.pid}",
            remedy="Load the pipeline in the worker, and nowhere before: gunicorn without "
            '--preload, multiprocessing.get_context("spawn").',
        )
