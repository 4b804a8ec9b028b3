"""The machine's own rate of matrix products: what a measured rate is a share of."""

from __future__ import annotations

import time

import torch

_SIZE = {"cpu": 2048, "cuda": 8192}
_REPEATS = 8


def matmul_rate(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Operations per second of one large square matrix product, the best of 8, by torch.

    A multiply and an add are two operations. Float32 is what torch makes of it as it is set: on a
    GPU without TF32 unless that was switched on.
    """
    size = _SIZE[torch.device(device).type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    best = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
