"""Capturing functions as CUDA graphs: what can be captured, how, and what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from hcma_fast.engine import Engine, Stateful
from hcma_fast.errors import BackendError, DeviceMemoryError, UsageError
from hcma_fast.specs import STEP_NAMES, GraphName

CaptureMode = Literal["step", "trajectory"]
Capture = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]
"""From a function, and one to warm up with, to a function that does the same again as the first, at
the same addresses."""
CAPTURABLE = ("eager", "torch-compile", "tensorrt", "tensorrt-rtx")
"""Backends whose work goes to torch's stream, where a CUDA graph catches it.

What an engine allocates while it is captured, outputs included, lies in the graphs' own pool: the
evaluation copies what it keeps into its buffers, so nothing there outlives the evaluation. That is
so for any engine. Those of `torch-compile` (AOTInductor) are opened so that a capture can hold them
(``export.aoti.runner`` says how); the warm-up is the run in which they load their kernels.
"""
_SAMPLED: tuple[GraphName, ...] = ("align", "unet_grounded", "unet_plain", *STEP_NAMES)
_WARM_UPS = 3


def check_capturable(
    mode: str,
    device: str,
    backend: str,
    grad_backend: str | None,
    engines: Mapping[GraphName, Engine],
) -> None:
    """Refuse what no CUDA graph can hold.

    Raises:
        UsageError: an unknown mode, or a device without CUDA graphs.
        BackendError: a backend that runs elsewhere than on torch's stream, engines that were built
            without what a capture needs, or no Triton.
    """
    if mode not in get_args(CaptureMode):
        raise UsageError(
            "unknown way to capture",
            value=mode,
            remedy=f"Use one of {', '.join(get_args(CaptureMode))}.",
        )
    if torch.device(device).type != "cuda":
        raise UsageError(
            "CUDA graphs need an NVIDIA GPU",
            value=device,
            remedy="Leave them off, or use the device cuda.",
        )
    if backend not in CAPTURABLE or grad_backend == "onnx":
        raise BackendError(
            "this backend's work cannot be captured as a CUDA graph",
            value="the gradient by onnx" if backend in CAPTURABLE else backend,
            remedy=f"Use {', '.join(CAPTURABLE)}, and a gradient other than onnx.",
        )
    for name in _SAMPLED:
        engine = engines.get(name)
        if isinstance(engine, Stateful):
            engine.check_capturable()
    if find_spec("triton") is None:
        raise BackendError(
            "the captured sampler updates the latent by a Triton kernel, and Triton is missing",
            remedy='Run pip install "hcma-fast[gpu]".',
        )


class CudaGraphs:
    """Captures functions of no argument; the graphs share the memory of their intermediates.

    That is safe because they run one after the other, and leave nothing there that outlives them.
    """

    _one_at_a_time = threading.Lock()
    """CUDA allows one capture in a process"""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        # Of their own: cuBLAS keeps a workspace per stream, and that of torch's shared capture
        # stream would belong to whichever sampler came first. Warm-ups run on another one, lest
        # their workspace lie outside of the pool.
        self.stream, self.warm_up_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def __call__(
        self, function: Callable[[], None], warm_up: Callable[[], None]
    ) -> Callable[[], None]:
        """A function that replays what ``function`` launches."""
        current = torch.cuda.current_stream(self.device)
        self.warm_up_stream.wait_stream(current)
        with torch.cuda.stream(self.warm_up_stream):
            for _ in range(_WARM_UPS):
                warm_up()
        current.wait_stream(self.warm_up_stream)
        self.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        # the outer context leaves the stream even where the end of the capture fails; other
        # threads may go on using the GPU
        with (
            self._one_at_a_time,
            torch.cuda.stream(self.stream),
            torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            function()
        current.wait_stream(self.stream)
        return graph.replay


def no_capture(function: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
    """Stands in for :class:`CudaGraphs` where there are none: the function is called again."""
    return function


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raises DeviceMemoryError where torch lacks memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            "out of memory for the sampler's buffers and graphs",
            remedy="Generate fewer images at once.",
        ) from error


@contextmanager
def capture_errors() -> Iterator[None]:
    """Raises BackendError where CUDA refuses to capture, DeviceMemoryError for want of memory."""
    try:
        yield
    except RuntimeError as error:
        # AOTInductor's code passes on which call failed, and not torch's own error
        if not isinstance(error, torch.AcceleratorError) and "API call failed" not in str(error):
            raise
        if "out of memory" in str(error):
            raise DeviceMemoryError(
                "out of memory for a CUDA graph", remedy="Generate fewer images at once."
            ) from error
        raise BackendError(
            f"the evaluation cannot be captured as a CUDA graph: {error}",
            remedy="Leave CUDA graphs off, and report it with the output of hcma-fast doctor.",
        ) from error
