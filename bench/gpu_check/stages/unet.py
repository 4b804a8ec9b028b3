"""The grounded UNet alone, at full size with random weights: layouts, attention, compilers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hcma_fast.bench.gpu_check.device import Device
from hcma_fast.bench.gpu_check.weights import model_parts
from hcma_fast.bench.gpu_check.worker import Case, Figures, Wrong
from hcma_fast.export.backends.aoti.build import Tuning, compile_aoti
from hcma_fast.export.backends.aoti.engine import CompiledEngine
from hcma_fast.export.channels_last import channels_last
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.precision import Precision, at_precision
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import BatchRange, GraphName, IOSpec

PRECISION: Precision = "bfloat16"
GRAPH: GraphName = "unet_grounded"
_ERROR = 0.05
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def cases(device: Device, *, small: bool, result: Path) -> list[Case]:
    """By value: eager with its channels last, attention, compiled, then compiled with flags."""
    bench = _UNet(device, small)
    batches = (1, 2) if small else (1, 8)
    kernels = ("math",) if device.kind == "cpu" else tuple(_KERNELS)
    found = [Case(f"eager, batch {size}", partial(bench.eager, size)) for size in batches]
    found += [
        Case("eager, batch 1, CUDA graph", bench.captured),
        Case("eager, batch 1, launches", bench.launches),
        Case("eager NCHW, batch 1", bench.as_torch_lays_it_out),
        *(
            Case(f"eager, batch 1, attention {name}", partial(bench.attention, name))
            for name in kernels
        ),
    ]
    if not small:
        found += [
            Case(f"torch-compile, batch {size}", partial(bench.compiled, size)) for size in batches
        ]
        found.append(
            Case("torch-compile, batch 1, autotuned", partial(bench.compiled, 1, "autotune"))
        )
    return found


class _UNet:
    def __init__(self, device: Device, small: bool) -> None:
        self.device, self.small = device, small
        self.repeats = 1 if small else 20

    @cached_property
    def parts(self) -> Components:
        return model_parts(self.device.place, small=self.small, parts=("unet",))

    @cached_property
    def module(self) -> nn.Module:
        return channels_last(self._draw())

    def spec(self, batch: int) -> IOSpec:
        return self.parts.specs(batch=BatchRange(batch, batch, batch))[GRAPH]

    def inputs(self, batch: int) -> dict[str, Tensor]:
        drawn = random_inputs(self.spec(batch), 2 * batch, torch.Generator().manual_seed(0))
        return {name: value.to(self.device.place) for name, value in drawn.items()}

    def eager(self, batch: int) -> Figures:
        return self._time(self.module, batch)

    def as_torch_lays_it_out(self) -> Figures:
        return self._time(self._draw(), 1)

    def attention(self, name: str) -> Figures:
        return self._time(self.module, 1, partial(sdpa_kernel, _KERNELS[name]))

    def captured(self) -> Figures:
        inputs = [*self.inputs(1).values()]
        with torch.no_grad():
            expected = self.module(*inputs)[0]
            found = torch.empty_like(expected)

            def run() -> None:
                found.copy_(self.module(*inputs)[0])

            replay = self.device.capture()(run, run)
            found.zero_()
            replay()
            error = float((found - expected).norm() / expected.norm())
            times = self.device.seconds(replay, self.repeats)
        figures = self._figures(1, times) | {"error_to_eager": error}
        if not error <= _ERROR:
            raise Wrong("the captured evaluation differs from the plain one", figures)
        return figures

    def launches(self) -> Figures:
        inputs = [*self.inputs(1).values()]
        with torch.no_grad():
            return self.device.calls(lambda: self.module(*inputs))

    def compiled(self, batch: int, tuning: Tuning = "default") -> Figures:
        spec, inputs = self.spec(batch), self.inputs(batch)
        with TemporaryDirectory() as folder:
            file = Path(folder) / "unet.pt2"
            started = time.monotonic()
            compile_aoti(spec, self._draw(), file, device=self.device.place, tuning=tuning)
            compile_s = time.monotonic() - started
            engine = CompiledEngine(file, spec)
        with torch.no_grad():
            expected = self.module(*inputs.values())[0]
            found = engine(inputs)["noise_pred"]
            error = float((found - expected).norm() / expected.norm())
            times = self.device.seconds(lambda: engine(inputs), self.repeats)
        figures = self._figures(batch, times) | {"error_to_eager": error, "compile_s": compile_s}
        if not error <= _ERROR:
            raise Wrong("the compiled graph does not agree with eager", figures)
        return figures

    def _draw(self) -> nn.Module:
        return at_precision(GRAPH, self.parts.graph(GRAPH).to(self.device.place), PRECISION)

    @torch.no_grad()
    def _time(
        self,
        module: nn.Module,
        batch: int,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Figures:
        inputs = [*self.inputs(batch).values()]
        with within():
            times = self.device.seconds(lambda: module(*inputs), self.repeats)
        return self._figures(batch, times)

    def _figures(self, batch: int, times: list[float]) -> dict[str, Any]:
        return {
            "graph": GRAPH,
            "batch": batch,
            "precision": PRECISION,
            "model": "tiny" if self.small else "sd14",
            "median_ms": median(times) * 1e3,
            "best_ms": min(times) * 1e3,
            "peak_mib": self.device.peak_mib(),
        }
