"""The embedded model in half precision: all ways to run it give the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hcma_fast.bench.gpu_check.device import Device
from hcma_fast.bench.gpu_check.worker import Case, Figures, Wrong
from hcma_fast.bench.speed.harness.contestants import LAYOUT, PROMPT
from hcma_fast.engine import Engine
from hcma_fast.export.backends.aoti.build import compile_aoti
from hcma_fast.export.backends.aoti.engine import CompiledEngine
from hcma_fast.export.backends.eager import eager_engines
from hcma_fast.export.precision import Precision, at_precision
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.capture import CaptureMode
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.specs import BatchRange, GraphName

_HALF_ERROR, _SAME = 0.1, 0.02
"""Relative error of the final latent: of half precision; of the same engines, captured"""
_COMPILED: tuple[GraphName, ...] = ("align", "unet_grounded", "unet_plain")


def cases(device: Device, *, small: bool, result: Path) -> list[Case]:
    """Eager, compiled, captured per step and as one trajectory; each against float32."""
    bench = _Tiny(device, small)
    half = f"eager {device.half}"
    return [
        Case("eager float32", partial(bench.run, "float32")),
        Case(half, partial(bench.run, "eager")),
        Case(f"{half}, CUDA graph per step", partial(bench.run, "eager", "step")),
        Case(f"{half}, CUDA graph of the trajectory", partial(bench.run, "eager", "trajectory")),
        Case(f"{half}, launches", partial(bench.launches, "eager", None)),
        Case(f"{half}, CUDA graph per step, launches", partial(bench.launches, "eager", "step")),
        *(
            []
            if small
            else [
                Case("torch-compile", partial(bench.run, "compiled")),
                Case("torch-compile, CUDA graph per step", partial(bench.run, "compiled", "step")),
                Case("torch-compile, launches", partial(bench.launches, "compiled", "step")),
            ]
        ),
    ]


class _Tiny:
    def __init__(self, device: Device, small: bool) -> None:
        self.device = device
        self.steps, self.repeats = (3, 1) if small else (50, 3)
        self.engines: dict[str, Mapping[GraphName, Engine]] = {}
        self.compile_s = 0.0

    @cached_property
    def parts(self) -> Components:
        return load_components("tiny")

    @cached_property
    def exact(self) -> Tensor:
        """The final latent in float32."""
        return self._generate(self._pipe("float32", None))

    @cached_property
    def half(self) -> Tensor:
        """The final latent of the plain loop in half precision."""
        return self._generate(self._pipe("eager", None))

    def run(self, kind: str, mode: CaptureMode | None = None) -> Figures:
        """Latents against float32, captured ones also against the plain loop's; and seconds."""
        pipe = self._pipe(kind, mode)
        latent = self._generate(pipe)
        figures: dict[str, Any] = {"error_to_float32": _relative(latent, self.exact)}
        if mode is not None and kind == "eager":
            figures["error_to_plain"] = _relative(latent, self.half)
        times = self.device.seconds(lambda: self._generate(pipe), self.repeats, warm_up=1)
        figures |= {"steps": self.steps, "median_s": median(times), "seconds": times}
        if kind == "compiled":
            figures["compile_s"] = self.compile_s
        if not figures["error_to_float32"] <= _HALF_ERROR:
            raise Wrong("the image is not that of float32", figures)
        if not figures.get("error_to_plain", 0.0) <= _SAME:
            raise Wrong("the captured sampler does not give the plain one's image", figures)
        return figures

    def launches(self, kind: str, mode: CaptureMode | None) -> Figures:
        """Per evaluation; PLMS makes one more than it has steps."""
        pipe = self._pipe(kind, mode)
        self._generate(pipe)
        found = self.device.calls(lambda: self._generate(pipe))
        return {name: count / (self.steps + 1) for name, count in found.items()} | {
            "evaluations": self.steps + 1
        }

    def _generate(self, pipe: HCMAPipeline) -> Tensor:
        out = pipe(PROMPT, LAYOUT, seed=0, num_inference_steps=self.steps, output_type="pt")
        return out.latents

    def _pipe(self, kind: str, mode: CaptureMode | None) -> HCMAPipeline:
        if kind not in self.engines:
            self.engines[kind] = _make(self, kind)
        pipe = HCMAPipeline(
            self.engines[kind],
            self.parts.tokenizer,
            self.parts.info,
            backend="eager",
            weights_hash=self.parts.weights_hash,
            device=self.device.place,
        )
        if mode is not None:
            pipe.replay = ReplaySampler(
                self.engines[kind], self.device.place, mode=mode, capture=self.device.capture()
            )
        return pipe


def _make(bench: _Tiny, kind: str) -> Mapping[GraphName, Engine]:
    parts, place = bench.parts, bench.device.place
    precision: Precision = "float32" if kind == "float32" else bench.device.half
    specs = parts.specs()
    if kind != "compiled":
        return eager_engines(parts.graphs(), specs, place, precision)
    bench._pipe("eager", None)
    fixed = parts.specs(batch=BatchRange(1, 1, 1))
    found = dict(bench.engines["eager"])

    def build() -> None:
        with TemporaryDirectory() as folder:
            for name in _COMPILED:
                file = Path(folder) / f"{name}.pt2"
                module = at_precision(name, parts.graph(name), precision)
                compile_aoti(fixed[name], module, file, device=place)
                found[name] = CompiledEngine(file, fixed[name])

    bench.compile_s = _once(build)
    return found


def _once(call: Callable[[], None]) -> float:
    import time

    started = time.monotonic()
    call()
    return round(time.monotonic() - started, 1)


@torch.no_grad()
def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())
