"""What the kernels share: Triton where it is installed, and one launch as data."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from hcma_fast.errors import BackendError, UsageError

if TYPE_CHECKING:
    triton: Any
    tl: Any
    argument: TypeAlias = Any
    constexpr: TypeAlias = Any
else:
    try:
        triton = importlib.import_module("triton")
        tl = importlib.import_module("triton.language")
    except ImportError:
        triton = tl = argument = constexpr = None
    else:
        # annotations of kernel parameters: Triton reads them too, and knows only its own names
        argument, constexpr = tl.tensor, tl.constexpr

FP_FUSION = True
"""Fused multiply-adds in every kernel. Said at each launch, since Triton 3.9 warns of a default
that will change; TRITON_DEFAULT_FP_FUSION then has no say."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(function: Callable[..., None]) -> Any:
    """``triton.jit``; without Triton, something that only :meth:`Launch.run` may touch."""
    return function if triton is None else triton.jit(function)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what runs on a GPU is what the offline table compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int]
    """by the kernel's parameter names; tensors are contiguous"""
    constants: Mapping[str, int | float | bool]
    num_warps: int
    num_stages: int = 2

    def run(self) -> None:
        """Launch on the device of the arguments, on its current stream.

        Raises:
            BackendError: Triton is not installed.
            UsageError: a dtype that the kernels do not know.
        """
        if triton is None:
            raise BackendError(
                "CUDA tensors need the Triton kernels, and Triton is not installed",
                remedy="Run pip install 'hcma-fast[gpu]'.",
            )
        tensors = [value for value in self.arguments.values() if isinstance(value, Tensor)]
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
                raise UsageError(
                    "the Triton kernels take float32, float16 and bfloat16",
                    value=str(tensor.dtype),
                    remedy="Convert the tensor, or call the reference.",
                )
        with torch.cuda.device_of(tensors[0]):
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                enable_fp_fusion=FP_FUSION,
            )


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``, and at least 1."""
    return 1 << max(count - 1, 0).bit_length()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a reference computes in: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def require_contiguous(**tensors: Tensor) -> None:
    """For tensors that an op writes into.

    Raises:
        UsageError: one of them is not contiguous.
    """
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise UsageError(
                f"{name} is updated in place and must be contiguous",
                value=tuple(tensor.stride()),
                remedy="Allocate it once with torch.empty and keep it.",
            )


def require_no_gradient(*tensors: Tensor | None) -> None:
    """For ops that write in place, which autograd would take for the identity.

    Raises:
        UsageError: autograd records, and one of the tensors takes part.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise UsageError(
            "an update in place has no gradient",
            remedy="Call it under torch.no_grad(), or use align_update.",
        )
