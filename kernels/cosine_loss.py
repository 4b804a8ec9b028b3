"""Both alignment losses and their gradient with respect to the features, in one launch (Eq. 6-8).

With a = f, b = f^T, s = a.b / (|a| |b|): d(1 - s)/da = (s a / |a| - b / |b|) / |a|. Norms have the
floor of :mod:`hcma_fast.losses`; below it, only the second summand is left.

On CPU tensors the op runs the reference, since Triton needs a GPU; on CUDA tensors the kernel.
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

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""objective (B,), loss_global (B,), loss_local (B, M), grad_global (B, D), grad_local (B, M, D)"""

_FLOOR = 1e-12  # of the squared norm, as in losses.py
_TILE = 8192  # elements that a program holds of each input at a time
_WARPS = 8


def cosine_loss_reference(
    f_global: Tensor,
    caption: Tensor,
    f_local: Tensor,
    labels: Tensor,
    mask: Tensor,
    lambdas: Tensor,
) -> Outputs:
    """Omega^G and Omega^L (paper Eq. 6, 7) and the gradient of their sum (Eq. 8), in plain torch.

    Args:
        f_global, caption: (B, D); f_local, labels: (B, M, D); mask: (B, M) of 0 and 1, any dtype;
        lambdas: (2,), or (B, 2) for weights per image. float64 in gives float64 out.

    Returns:
        objective (B,) = lambda1 Omega^G + lambda2 Omega^L; loss_global (B,); loss_local (B, M), 0
        where masked; the gradients of the objective's sum over the batch with respect to f_global
        and f_local, in their dtype (values beyond float16's range become its largest). Losses are
        float32 for half precision.
    """
    dtype = working_dtype(f_global.dtype)
    weights, valid = lambdas.to(dtype), mask.to(dtype)
    loss_global, slope_global = _distance(f_global.to(dtype), caption.to(dtype))
    loss_local, slope_local = _distance(f_local.to(dtype), labels.to(dtype))
    # what a masked box holds may be anything: it is dropped, not multiplied by 0
    loss_local = torch.where(valid == 0, 0, loss_local * valid)
    count = valid.sum(-1).clamp(min=1)
    lambda_global, lambda_local = weights[..., 0], weights[..., 1]
    objective = lambda_global * loss_global + lambda_local * loss_local.sum(-1) / count
    per_image = lambda_global.expand(f_global.shape[0]).unsqueeze(-1)
    per_box = ((lambda_local / count).unsqueeze(-1) * valid).unsqueeze(-1)
    return (
        objective,
        loss_global,
        loss_local,
        _store_as(per_image * slope_global, f_global.dtype),
        _store_as(torch.where(per_box == 0, 0, per_box * slope_local), f_local.dtype),
    )


def _distance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos over the last dimension, and its gradient with respect to ``a``."""
    square = (a * a).sum(-1, keepdim=True)
    inverse_a = square.clamp(min=_FLOOR).rsqrt()
    inverse_b = (b * b).sum(-1, keepdim=True).clamp(min=_FLOOR).rsqrt()
    cosine = (a * b).sum(-1, keepdim=True) * (inverse_a * inverse_b)
    radial = torch.where(square >= _FLOOR, cosine * inverse_a, 0) * a
    return 1 - cosine.squeeze(-1), (radial - b * inverse_b) * inverse_a


def _store_as(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        value = value.clamp(-largest, largest)
    return value.to(dtype)


@jit
def _cosine_loss_kernel(
    f_global: argument,
    caption: argument,
    f_local: argument,
    labels: argument,
    mask: argument,
    lambdas: argument,
    objective: argument,
    loss_global: argument,
    loss_local: argument,
    grad_global: argument,
    grad_local: argument,
    boxes: argument,
    width: argument,
    lambda_stride: argument,
    FLOOR: constexpr,
    LARGEST: constexpr,
    SLOTS: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
) -> None:
    # one program per image: it alone sums the boxes, so the objective needs no atomics
    image = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    within = columns < width
    lambda_global = tl.load(lambdas + image * lambda_stride)
    lambda_local = tl.load(lambdas + image * lambda_stride + 1)

    # C2IA (Eq. 6)
    here = image * width + columns
    f = tl.load(f_global + here, mask=within, other=0).to(tl.float32)
    text = tl.load(caption + here, mask=within, other=0).to(tl.float32)
    # comparisons keep a NaN, which minimum and maximum would hide
    square, square_text = tl.sum(f * f), tl.sum(text * text)
    inverse_f = tl.rsqrt(tl.where(square < FLOOR, FLOOR, square))
    inverse_text = tl.rsqrt(tl.where(square_text < FLOOR, FLOOR, square_text))
    cosine = tl.sum(f * text) * (inverse_f * inverse_text)
    radial = tl.where(square >= FLOOR, cosine * inverse_f, 0.0)
    slope = lambda_global * (radial * f - text * inverse_text) * inverse_f
    if LARGEST > 0:
        slope = tl.where(slope > LARGEST, LARGEST, tl.where(slope < -LARGEST, -LARGEST, slope))
    tl.store(grad_global + here, slope, mask=within)
    tl.store(loss_global + image, 1 - cosine)
    total = lambda_global * (1 - cosine)

    # O2RA (Eq. 7)
    slots = tl.arange(0, SLOTS)
    valid = tl.load(mask + image * boxes + slots, mask=slots < boxes, other=0).to(tl.float32)
    share = lambda_local / tl.maximum(tl.sum(valid), 1.0)
    for start in range(0, boxes, ROWS):
        rows = start + tl.arange(0, ROWS)
        exists = rows < boxes
        at_row = image * boxes + rows
        weight = tl.load(mask + at_row, mask=exists, other=0).to(tl.float32)
        tile = at_row[:, None] * width + columns[None, :]
        # boxes that are masked out are not read
        used = (weight != 0)[:, None] & within[None, :]
        fs = tl.load(f_local + tile, mask=used, other=0).to(tl.float32)
        texts = tl.load(labels + tile, mask=used, other=0).to(tl.float32)
        squares, squares_text = tl.sum(fs * fs, axis=1), tl.sum(texts * texts, axis=1)
        inverse_fs = tl.rsqrt(tl.where(squares < FLOOR, FLOOR, squares))
        inverse_texts = tl.rsqrt(tl.where(squares_text < FLOOR, FLOOR, squares_text))
        cosines = tl.sum(fs * texts, axis=1) * (inverse_fs * inverse_texts)
        losses = (1 - cosines) * weight
        tl.store(loss_local + at_row, losses, mask=exists)
        total += share * tl.sum(losses)
        radials = tl.where(squares >= FLOOR, cosines * inverse_fs, 0.0)
        slopes = (radials[:, None] * fs - texts * inverse_texts[:, None]) * inverse_fs[:, None]
        slopes = slopes * (share * weight)[:, None]
        if LARGEST > 0:
            slopes = tl.where(
                slopes > LARGEST, LARGEST, tl.where(slopes < -LARGEST, -LARGEST, slopes)
            )
        tl.store(grad_local + tile, slopes, mask=exists[:, None] & within[None, :])
    tl.store(objective + image, total)


def _empty_outputs(f_global: Tensor, f_local: Tensor) -> Outputs:
    dtype = working_dtype(f_global.dtype)
    batch, boxes = f_local.shape[:2]
    return (
        f_global.new_empty(batch, dtype=dtype),
        f_global.new_empty(batch, dtype=dtype),
        f_global.new_empty(batch, boxes, dtype=dtype),
        torch.empty_like(f_global, memory_format=torch.contiguous_format),
        torch.empty_like(f_local, memory_format=torch.contiguous_format),
    )


def cosine_loss_launch(
    f_global: Tensor,
    caption: Tensor,
    f_local: Tensor,
    labels: Tensor,
    mask: Tensor,
    lambdas: Tensor,
) -> tuple[Launch, Outputs]:
    """The launch for these tensors, and the outputs that it will fill; see the reference.

    Raises:
        UsageError: wider than 8192, which no tile of the kernel holds.
    """
    batch, boxes, width = f_local.shape
    columns = power_of_two(width)
    if columns > _TILE:
        raise UsageError(
            f"the cosine kernel takes features of at most {_TILE} entries",
            value=width,
            remedy="Use the eager loss.",
        )
    outputs = _empty_outputs(f_global, f_local)
    names = ("objective", "loss_global", "loss_local", "grad_global", "grad_local")
    launch = Launch(
        _cosine_loss_kernel,
        (batch,),
        {
            "f_global": f_global.contiguous(),
            "caption": caption.contiguous(),
            "f_local": f_local.contiguous(),
            "labels": labels.contiguous(),
            "mask": mask.contiguous(),
            "lambdas": lambdas.float().contiguous(),
            **dict(zip(names, outputs, strict=True)),
            "boxes": boxes,
            "width": width,
            "lambda_stride": 2 if lambdas.dim() == 2 else 0,
        },
        {
            "FLOOR": _FLOOR,
            # 0: no clamp, the other dtypes reach as far as float32
            "LARGEST": torch.finfo(torch.float16).max if f_global.dtype == torch.float16 else 0.0,
            "SLOTS": power_of_two(boxes),
            "ROWS": min(max(_TILE // columns, 1), 16),
            "COLUMNS": columns,
        },
        num_warps=_WARPS,
    )
    return launch, outputs


def cosine_loss_cuda(
    f_global: Tensor,
    caption: Tensor,
    f_local: Tensor,
    labels: Tensor,
    mask: Tensor,
    lambdas: Tensor,
) -> Outputs:
    """As :func:`cosine_loss_reference`, by the Triton kernel.

    Raises:
        BackendError, UsageError: see :meth:`Launch.run` and :func:`cosine_loss_launch`.
    """
    launch, outputs = cosine_loss_launch(f_global, caption, f_local, labels, mask, lambdas)
    launch.run()
    return outputs


cosine_loss_op = torch.library.custom_op(
    "hcma_fast::cosine_loss", cosine_loss_reference, mutates_args=(), device_types="cpu"
)
cosine_loss_op.register_kernel("cuda")(cosine_loss_cuda)


@cosine_loss_op.register_fake
def _(
    f_global: Tensor,
    caption: Tensor,
    f_local: Tensor,
    labels: Tensor,
    mask: Tensor,
    lambdas: Tensor,
) -> Outputs:
    return _empty_outputs(f_global, f_local)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Outputs) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, cotangent: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    grad_global, grad_local = ctx.saved_tensors
    if cotangent is None:
        return (None,) * 6
    per_image = cotangent.unsqueeze(-1)
    return (
        (per_image * grad_global).to(grad_global.dtype),
        None,
        (per_image.unsqueeze(-1) * grad_local).to(grad_local.dtype),
        None,
        None,
        None,
    )


cosine_loss_op.register_autograd(_backward, setup_context=_setup_context)


class _CosineLoss(torch.autograd.Function):
    """The op for torch.func, which refuses the autograd of custom ops (torch 2.13)."""

    @staticmethod
    def forward(
        f_global: Tensor,
        caption: Tensor,
        f_local: Tensor,
        labels: Tensor,
        mask: Tensor,
        lambdas: Tensor,
    ) -> Outputs:
        # one by one: dynamo counts the parameters to see whether there is a context
        return cosine_loss_op(f_global, caption, f_local, labels, mask, lambdas)  # type: ignore[no-any-return]

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


def cosine_loss(
    f_global: Tensor,
    caption: Tensor,
    f_local: Tensor,
    labels: Tensor,
    mask: Tensor,
    lambdas: Tensor,
) -> Outputs:
    """The op ``hcma_fast::cosine_loss``; see :func:`cosine_loss_reference` for the arguments.

    Of the outputs only the objective has a gradient, and only with respect to ``f_global`` and
    ``f_local``; texts, mask and lambdas count as constants. Who needs nothing but the gradient
    feeds ``grad_global`` and ``grad_local`` to the backward pass of the features and spares a
    multiplication by one.
    """
    return _CosineLoss.apply(f_global, caption, f_local, labels, mask, lambdas)  # type: ignore[no-any-return, no-untyped-call]
