"""The suite of the Triton kernels on a GPU: each beside its reference in torch's own operators.

Sizes are those of ``sd14``, as in ``bench.estimates.kernel_resources``, which counts the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcma_fast.bench.estimates.kernel_resources import CASES, DTYPES
from hcma_fast.bench.speed.harness.plan import Plan
from hcma_fast.bench.speed.harness.rounds import Case, Group
from hcma_fast.bench.speed.harness.workers import Contestant
from hcma_fast.config import AlignmentSettings
from hcma_fast.kernels.align_update import align_update_in_place_cuda, align_update_reference
from hcma_fast.kernels.cosine_loss import cosine_loss_cuda, cosine_loss_reference
from hcma_fast.kernels.denoise_update import (
    denoise_update_cuda,
    denoise_update_reference,
)
from hcma_fast.kernels.region_pool import (
    region_pool_backward_cuda,
    region_pool_backward_reference,
    region_pool_cuda,
    region_pool_reference,
)
from hcma_fast.sampling.capture import CudaGraphs
from hcma_fast.sampling.schedule import Schedule

TORCH, TRITON = "torch", "Triton"
_CALLS = 2000
"""In a run: one takes microseconds"""
_CAPTURED = 200
"""Of these in one CUDA graph: launched one by one, the host would be what is timed"""
ERRORS = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
"""Relative error against the reference above which a row is void"""


@dataclass(frozen=True)
class Kernel:
    """Both implementations, and which of the launch's tensors they take, in order."""

    inputs: tuple[str, ...]
    reference: Callable[..., Tensor | Sequence[Tensor] | None]
    launch: Callable[..., Tensor | Sequence[Tensor] | None]
    """None where it writes over the first input"""
    last: tuple[bool, ...] = ()
    """what both take besides"""


def _without_move(
    update: Callable[..., tuple[Tensor, ...] | None], *inputs: Tensor
) -> tuple[Tensor, ...] | None:
    """The update by a solver that uses neither the alignment's move nor noise."""
    *state, plan, step = inputs
    return update(*state, None, None, plan, step)


KERNELS = {
    "cosine_loss": Kernel(
        ("f_global", "caption", "f_local", "labels", "mask", "lambdas"),
        cosine_loss_reference,
        cosine_loss_cuda,
    ),
    "region_pool": Kernel(("local", "regions"), region_pool_reference, region_pool_cuda),
    "region_pool_backward": Kernel(
        ("grad", "regions", "total"), region_pool_backward_reference, region_pool_backward_cuda
    ),
    "denoise_update": Kernel(
        ("z", "stored", "history", "eps_uncond", "eps_cond", "plan", "step"),
        partial(_without_move, denoise_update_reference),
        partial(_without_move, denoise_update_cuda),
    ),
    "align_update": Kernel(
        ("z", "gradient", "table", "step"),
        align_update_reference,
        align_update_in_place_cuda,
        (False,),
    ),
    "align_update_normalized": Kernel(
        ("z", "gradient", "table", "step"),
        align_update_reference,
        align_update_in_place_cuda,
        (True,),
    ),
}


def kernels(plan: Plan) -> list[Group]:
    """A run is 2000 calls, as CUDA graphs; the label ``bytes`` is the least that a call moves."""
    dtypes = DTYPES[:1] if plan.quick else ("float16", "float32")
    calls = 5 if plan.quick else _CALLS
    return [
        Group(
            f"{name}, {dtype}",
            [
                Case(
                    which,
                    partial(load_kernel, name, dtype, which, calls, plan.device),
                    {"calls": calls, "bytes": CASES[name](getattr(torch, dtype), 1)[1].minimum},
                    calls,
                    ERRORS[dtype],
                )
                for which in (TORCH, TRITON)
            ],
        )
        for name in KERNELS
        for dtype in dtypes
    ]


def load_kernel(name: str, dtype: str, which: str, calls: int, device: str) -> Contestant:
    """``calls`` calls of a kernel, or of its reference, on random tensors; its result is the first
    output of a call.

    Raises:
        BackendError: Triton is missing.
    """
    kernel = KERNELS[name]
    inputs = draw_inputs(name, dtype, device)
    run = kernel.launch if which == TRITON else kernel.reference

    # what is written in place is moved by every call: compared is the first one
    own = [value.clone() for value in inputs]
    found = run(*own, *kernel.last)
    first = own[0] if found is None else found if isinstance(found, Tensor) else found[0]
    result: NDArray[np.float32] = first.float().cpu().numpy()

    def launch(count: int) -> None:
        for _ in range(count):
            run(*inputs, *kernel.last)

    repeats, each = max(1, calls // _CAPTURED), min(calls, _CAPTURED)
    once = partial(launch, each)
    replay = once if device == "cpu" else CudaGraphs(torch.device(device))(once, once)

    def generate() -> NDArray[np.float32]:
        _ = inputs  # a graph has their addresses alone
        for _ in range(repeats):
            replay()
        return result

    return Contestant(generate, "sd14", "none", device)


def draw_inputs(name: str, dtype: str, device: str) -> list[Tensor]:
    """The tensors of the offline table's launch at batch 1, filled, in the order of a call."""
    generator = torch.Generator().manual_seed(0)
    arguments = CASES[name](getattr(torch, dtype), 1)[0].arguments
    found = []
    for key in KERNELS[name].inputs:
        like = arguments[key]
        assert isinstance(like, Tensor)
        value = torch.rand(like.shape, generator=generator).to(like.dtype)
        if key == "step":
            value = torch.full(like.shape, 5)
        elif key == "plan":
            value = Schedule.of(50, AlignmentSettings()).plan[None].float()
        elif key == "mask":
            value = torch.ones(like.shape)
        found.append(value.to(device))
    return found
