"""The Triton kernels against their references in float64, and their time beside torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hcma_fast.bench.estimates.kernel_resources import CASES
from hcma_fast.bench.gpu_check.device import Device
from hcma_fast.bench.gpu_check.worker import Case, Figures, Wrong
from hcma_fast.bench.speed.suites.kernel_times import ERRORS, KERNELS, Kernel, draw_inputs

_CALLS = 100
"""In one captured graph: launched one by one, the host is what would be timed"""


def cases(device: Device, *, small: bool, result: Path) -> list[Case]:
    """Each kernel in half precision and in float32."""
    dtypes = ("float32",) if small else ("float16", "bfloat16", "float32")
    return [
        Case(f"{name}, {dtype}", partial(_check, device, name, dtype, small))
        for dtype in dtypes
        for name in KERNELS
    ]


def _check(device: Device, name: str, dtype: str, small: bool) -> Figures:
    kernel = KERNELS[name]
    inputs = draw_inputs(name, dtype, device.place)
    exact = _first(kernel.reference, kernel, [_wide(value) for value in inputs])
    found = _first(kernel.launch, kernel, [value.clone() for value in inputs])
    error = float((found.double() - exact).norm() / exact.norm())
    figures: dict[str, Any] = {"relative_error": error, "tolerance": ERRORS[dtype]}
    if not error <= ERRORS[dtype]:
        raise Wrong("the kernel does not agree with its reference", figures)
    if small:
        return figures
    triton = _time(device, kernel.launch, kernel, inputs)
    torchs = _time(device, kernel.reference, kernel, inputs)
    least = CASES[name](getattr(torch, dtype), 1)[1].minimum
    return {
        **figures,
        "triton_us": triton * 1e6,
        "torch_us": torchs * 1e6,
        "least_bytes": least,
        "gb_per_s": least / triton / 1e9,
    }


def _first(call: Callable[..., Any], kernel: Kernel, own: Sequence[Tensor]) -> Tensor:
    """The first output; where a kernel writes in place, the first input."""
    found = call(*own, *kernel.last)
    if found is None:
        return own[0]
    first: Tensor = found if isinstance(found, Tensor) else found[0]
    return first


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value.clone()


def _time(
    device: Device, call: Callable[..., Any], kernel: Kernel, inputs: Sequence[Tensor]
) -> float:
    """Seconds of one call."""

    def launch() -> None:
        for _ in range(_CALLS):
            call(*inputs, *kernel.last)

    replay = device.capture()(launch, partial(call, *inputs, *kernel.last))
    return median(device.seconds(replay, repeats=7)) / _CALLS
