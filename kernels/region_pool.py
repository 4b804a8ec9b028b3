"""Weighted mean of the cell features over each box (the pooling of O2RA, paper section 3.3.2).

On CPU tensors the ops run the reference, since Triton needs a GPU; on CUDA tensors the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hcma_fast.errors import UsageError
from hcma_fast.kernels.launch import (
    Launch,
    argument,
    constexpr,
    jit,
    power_of_two,
    tl,
    working_dtype,
)

_MAX_BOXES = 32
_COLUMNS = 256  # of Z, per program: few programs, since each of them reads the regions again
_WARPS = 8


def region_pool_reference(local: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """sum_n B_i(n) Z_n / sum_n B_i(n) (before the MLP of f^L, paper section 3.3.2).

    Args:
        local: Z^L (B, N, D); regions: B_i(n) (B, M, N), not negative, rounded to the dtype of
        ``local`` before anything else. float64 in gives float64 out.

    Returns:
        pooled (B, M, D) in the dtype of ``local``, 0 for a box without cells; and the sums of the
        regions (B, M), float32 for half precision.
    """
    dtype = working_dtype(local.dtype)
    weights = regions.to(local.dtype).to(dtype)
    total = weights.sum(-1)
    pooled = (weights @ local.to(dtype)) / _divisor(total).unsqueeze(-1)
    return pooled.to(local.dtype), total


def region_pool_backward_reference(grad: Tensor, regions: Tensor, total: Tensor) -> Tensor:
    """Gradient with respect to Z^L: sum_i B_i(n) g_i / sum_n B_i(n).

    Args:
        grad: g (B, M, D); regions: (B, M, N); total: (B, M) from the forward. Returns (B, N, D) in
        the dtype of ``grad``.
    """
    weights = regions.to(grad.dtype).to(total.dtype) / _divisor(total).unsqueeze(-1)
    return (weights.mT @ grad.to(total.dtype)).to(grad.dtype)


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, torch.ones_like(total))


@jit
def _region_pool_kernel(
    local: argument,
    regions: argument,
    pooled: argument,
    total: argument,
    boxes: argument,
    cells: argument,
    width: argument,
    ROWS: constexpr,
    CELLS: constexpr,
    COLUMNS: constexpr,
) -> None:
    image = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sums = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, cells, CELLS):
        at_cell = start + tl.arange(0, CELLS)
        values = tl.load(
            local + image * cells * width + at_cell[:, None] * width + columns[None, :],
            mask=(at_cell < cells)[:, None] & (columns < width)[None, :],
            other=0,
        )
        weights = tl.load(
            regions + image * boxes * cells + rows[:, None] * cells + at_cell[None, :],
            mask=(rows < boxes)[:, None] & (at_cell < cells)[None, :],
            other=0,
        ).to(values.dtype)
        sums += tl.sum(weights.to(tl.float32), axis=1)
        product = tl.dot(weights, values, product, input_precision="ieee")
    product = product / tl.where(sums > 0, sums, 1.0)[:, None]
    tl.store(
        pooled + image * boxes * width + rows[:, None] * width + columns[None, :],
        product,
        mask=(rows < boxes)[:, None] & (columns < width)[None, :],
    )
    if tl.program_id(0) == 0:
        tl.store(total + image * boxes + rows, sums, mask=rows < boxes)


@jit
def _region_pool_backward_kernel(
    grad: argument,
    regions: argument,
    total: argument,
    grad_local: argument,
    boxes: argument,
    cells: argument,
    width: argument,
    ROWS: constexpr,
    CELLS: constexpr,
    COLUMNS: constexpr,
) -> None:
    image = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slopes = tl.load(
        grad + image * boxes * width + rows[:, None] * width + columns[None, :],
        mask=(rows < boxes)[:, None] & (columns < width)[None, :],
        other=0,
    )
    sums = tl.load(total + image * boxes + rows, mask=rows < boxes, other=0)
    inverse = 1.0 / tl.where(sums > 0, sums, 1.0)
    for start in range(0, cells, CELLS):
        at_cell = start + tl.arange(0, CELLS)
        weights = tl.load(
            regions + image * boxes * cells + rows[:, None] * cells + at_cell[None, :],
            mask=(rows < boxes)[:, None] & (at_cell < cells)[None, :],
            other=0,
        )
        shares = (weights.to(slopes.dtype).to(tl.float32) * inverse[:, None]).to(slopes.dtype)
        tl.store(
            grad_local + image * cells * width + at_cell[:, None] * width + columns[None, :],
            tl.dot(tl.trans(shares), slopes, input_precision="ieee"),
            mask=(at_cell < cells)[:, None] & (columns < width)[None, :],
        )


def _options(batch: int, boxes: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of both kernels.

    Raises:
        UsageError: more boxes than a tile has rows.
    """
    if boxes > _MAX_BOXES:
        raise UsageError(
            f"the pooling kernel takes at most {_MAX_BOXES} boxes",
            value=boxes,
            remedy="The layout's limit is 30.",
        )
    # tl.dot takes 16 rows and more
    columns = min(max(power_of_two(width), 16), _COLUMNS)
    tile = {"ROWS": max(power_of_two(boxes), 16), "CELLS": 16, "COLUMNS": columns}
    return (-(-width // columns), batch), tile


def region_pool_launch(local: Tensor, regions: Tensor) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The launch for these tensors, and the outputs that it will fill; see the reference."""
    (batch, cells, width), boxes = local.shape, regions.shape[1]
    grid, tile = _options(batch, boxes, width)
    outputs = _empty_outputs(local, regions)
    arguments: dict[str, Tensor | int] = {
        "local": local.contiguous(),
        "regions": regions.contiguous(),
        "pooled": outputs[0],
        "total": outputs[1],
        "boxes": boxes,
        "cells": cells,
        "width": width,
    }
    return Launch(_region_pool_kernel, grid, arguments, tile, _WARPS), outputs


def region_pool_backward_launch(
    grad: Tensor, regions: Tensor, total: Tensor
) -> tuple[Launch, Tensor]:
    """The launch for these tensors, and the output that it will fill; see the reference."""
    (batch, boxes, width), cells = grad.shape, regions.shape[2]
    grid, tile = _options(batch, boxes, width)
    output = grad.new_empty(batch, cells, width)
    arguments: dict[str, Tensor | int] = {
        "grad": grad.contiguous(),
        "regions": regions.contiguous(),
        "total": total.contiguous(),
        "grad_local": output,
        "boxes": boxes,
        "cells": cells,
        "width": width,
    }
    return Launch(_region_pool_backward_kernel, grid, arguments, tile, _WARPS), output


def _empty_outputs(local: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    batch, boxes = regions.shape[:2]
    return (
        local.new_empty(batch, boxes, local.shape[2]),
        local.new_empty(batch, boxes, dtype=working_dtype(local.dtype)),
    )


def region_pool_cuda(local: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`region_pool_reference`, by the Triton kernel.

    Raises:
        BackendError, UsageError: see :meth:`Launch.run`; more than 32 boxes.
    """
    launch, outputs = region_pool_launch(local, regions)
    launch.run()
    return outputs


def region_pool_backward_cuda(grad: Tensor, regions: Tensor, total: Tensor) -> Tensor:
    """As :func:`region_pool_backward_reference`, by the Triton kernel; raises alike."""
    launch, output = region_pool_backward_launch(grad, regions, total)
    launch.run()
    return output


region_pool_op = torch.library.custom_op(
    "hcma_fast::region_pool", region_pool_reference, mutates_args=(), device_types="cpu"
)
region_pool_op.register_kernel("cuda")(region_pool_cuda)
region_pool_op.register_fake(_empty_outputs)

region_pool_backward_op = torch.library.custom_op(
    "hcma_fast::region_pool_backward",
    region_pool_backward_reference,
    mutates_args=(),
    device_types="cpu",
)
region_pool_backward_op.register_kernel("cuda")(region_pool_backward_cuda)


@region_pool_backward_op.register_fake
def _(grad: Tensor, regions: Tensor, total: Tensor) -> Tensor:
    # len() would fix the batch in a trace
    return grad.new_empty(grad.shape[0], regions.shape[2], grad.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor | None, _: object) -> tuple[Tensor | None, Tensor | None]:
    local, regions, pooled, total = ctx.saved_tensors
    if grad is None:
        return None, None
    grad_local = grad_regions = None
    if ctx.needs_input_grad[0]:
        grad_local = region_pool_backward_op(grad, regions, total)
    if ctx.needs_input_grad[1]:
        # only the training of the regions' gate wants this one, so torch does it
        along = (grad.to(total.dtype) * pooled.to(total.dtype)).sum(-1, keepdim=True)
        dots = grad.to(total.dtype) @ local.to(total.dtype).mT
        grad_regions = ((dots - along) / _divisor(total).unsqueeze(-1)).to(regions.dtype)
    return grad_local, grad_regions


region_pool_op.register_autograd(_backward, setup_context=_setup_context)


class _RegionPool(torch.autograd.Function):
    """The op for torch.func, which refuses the autograd of custom ops (torch 2.13)."""

    @staticmethod
    def forward(local: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        return region_pool_op(local, regions)  # type: ignore[no-any-return]

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


def region_pool(local: Tensor, regions: Tensor) -> Tensor:
    """The op ``hcma_fast::region_pool``, differentiable; see :func:`region_pool_reference`.

    Args:
        local: (B, N, D); regions: (B, M, N). Returns (B, M, D). The gradient with respect to
        ``regions`` is there too, in plain torch.
    """
    return _RegionPool.apply(local, regions)[0]  # type: ignore[no-any-return, no-untyped-call]
