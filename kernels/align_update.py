"""Update of the latent by the alignment gradient, eta from a device table (paper Eq. 8).

On CPU tensors the ops run the reference, since Triton needs a GPU; on CUDA tensors the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hcma_fast.kernels.launch import (
    Launch,
    argument,
    constexpr,
    jit,
    power_of_two,
    require_contiguous,
    require_no_gradient,
    tl,
    working_dtype,
)
from hcma_fast.kernels.step_table import rows_at, strides

_FLOOR = 1e-12  # of the squared norms, as in the aligner
_BLOCK = 1024
HELD = 16384
"""Elements of an image up to which the normalised step reads it only once."""


def align_update_reference(
    z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool
) -> Tensor:
    """Z^a = Z - eta_t g (paper Eq. 8); ``normalized``: Z - eta_t (|Z| / |g|) g, norms per image.

    Args:
        z, gradient: (B, ...); table: (T, K) of eta per evaluation; step: (S,) integers; T and S
        are 1 or B. A step outside the table leaves the latent as it is. float64 in gives float64
        out.
    """
    dtype = working_dtype(z.dtype)
    value, slope = z.to(dtype), gradient.to(dtype)
    rate = _eta(value, table, step)
    if normalized:
        rate = rate * (_square(value).clamp(min=_FLOOR) / _square(slope).clamp(min=_FLOOR)).sqrt()
    return torch.addcmul(value, rate, slope, value=-1).to(z.dtype)


def _eta(z: Tensor, table: Tensor, step: Tensor) -> Tensor:
    eta, inside = rows_at(table.to(z.dtype), step, len(z))
    return torch.where(inside, eta, 0).view(-1, *[1] * (z.dim() - 1))


def _square(value: Tensor) -> Tensor:
    """Squared norm per image, (B, 1, ...)."""
    return (value * value).flatten(1).sum(1).view(-1, *[1] * (value.dim() - 1))


@jit
def _align_update_kernel(
    z: argument,
    gradient: argument,
    table: argument,
    step: argument,
    out: argument,
    size: argument,
    steps: argument,
    table_stride: argument,
    step_stride: argument,
    BLOCK: constexpr,
) -> None:
    image = tl.program_id(1).to(tl.int64)
    at = tl.load(step + image * step_stride).to(tl.int64)
    inside = (at >= 0) & (at < steps)
    eta = tl.load(table + image * table_stride + at, mask=inside, other=0)
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = here < size
    value = tl.load(z + image * size + here, mask=within, other=0).to(tl.float32)
    slope = tl.load(gradient + image * size + here, mask=within, other=0).to(tl.float32)
    tl.store(out + image * size + here, value - eta * slope, mask=within)


@jit
def _align_update_normalized_kernel(
    z: argument,
    gradient: argument,
    table: argument,
    step: argument,
    out: argument,
    size: argument,
    steps: argument,
    table_stride: argument,
    step_stride: argument,
    FLOOR: constexpr,
    HELD: constexpr,
    BLOCK: constexpr,
) -> None:
    # one program per image, which alone knows both norms
    image = tl.program_id(0).to(tl.int64)
    at = tl.load(step + image * step_stride).to(tl.int64)
    inside = (at >= 0) & (at < steps)
    eta = tl.load(table + image * table_stride + at, mask=inside, other=0)
    here = tl.arange(0, BLOCK)
    if HELD:
        within = here < size
        value = tl.load(z + image * size + here, mask=within, other=0).to(tl.float32)
        slope = tl.load(gradient + image * size + here, mask=within, other=0).to(tl.float32)
        square_z, square_g = tl.sum(value * value), tl.sum(slope * slope)
        rate = eta * tl.sqrt(
            tl.where(square_z < FLOOR, FLOOR, square_z)
            / tl.where(square_g < FLOOR, FLOOR, square_g)
        )
        tl.store(out + image * size + here, value - rate * slope, mask=within)
    else:
        squares_z = tl.zeros([BLOCK], dtype=tl.float32)
        squares_g = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, size, BLOCK):
            within = start + here < size
            value = tl.load(z + image * size + start + here, mask=within, other=0).to(tl.float32)
            slope = tl.load(gradient + image * size + start + here, mask=within, other=0).to(
                tl.float32
            )
            squares_z += value * value
            squares_g += slope * slope
        square_z, square_g = tl.sum(squares_z), tl.sum(squares_g)
        rate = eta * tl.sqrt(
            tl.where(square_z < FLOOR, FLOOR, square_z)
            / tl.where(square_g < FLOOR, FLOOR, square_g)
        )
        for start in range(0, size, BLOCK):
            within = start + here < size
            value = tl.load(z + image * size + start + here, mask=within, other=0).to(tl.float32)
            slope = tl.load(gradient + image * size + start + here, mask=within, other=0).to(
                tl.float32
            )
            tl.store(out + image * size + start + here, value - rate * slope, mask=within)


def align_update_launch(
    z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool, out: Tensor
) -> Launch:
    """The launch that fills ``out``, which may be ``z``; both contiguous. See the reference."""
    batch, size = len(z), z[0].numel()
    arguments: dict[str, Tensor | int] = {
        "z": z,
        "gradient": gradient.contiguous(),
        "table": table.float().contiguous(),
        "step": step.contiguous(),
        "out": out,
        "size": size,
        "steps": table.shape[1],
        **strides(table, step, batch),
    }
    if not normalized:
        grid = (-(-size // _BLOCK), batch)
        return Launch(_align_update_kernel, grid, arguments, {"BLOCK": _BLOCK}, num_warps=4)
    held = size <= HELD
    constants = {
        "FLOOR": _FLOOR,
        "HELD": held,
        "BLOCK": power_of_two(size) if held else HELD // 2,
    }
    return Launch(_align_update_normalized_kernel, (batch,), arguments, constants, num_warps=16)


def align_update_cuda(
    z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool
) -> Tensor:
    """As :func:`align_update_reference`, by a Triton kernel.

    Raises:
        BackendError, UsageError: see :meth:`Launch.run`.
    """
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    align_update_launch(z.contiguous(), gradient, table, step, normalized, out).run()
    return out


def align_update_in_place_cuda(
    z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool
) -> None:
    """As :func:`align_update_`, by a Triton kernel; raises as :func:`align_update_cuda`."""
    require_contiguous(z=z)
    align_update_launch(z, gradient, table, step, normalized, z).run()


align_update = torch.library.custom_op(
    "hcma_fast::align_update", align_update_reference, mutates_args=(), device_types="cpu"
)
align_update.register_kernel("cuda")(align_update_cuda)


@align_update.register_fake
def _(z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.normalized = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    z, gradient, table, step = ctx.saved_tensors
    dtype = working_dtype(z.dtype)
    value, slope, along = z.to(dtype), gradient.to(dtype), cotangent.to(dtype)
    rate = _eta(value, table, step)
    to_z, to_gradient = along, -rate * along
    if ctx.normalized:
        square_z, square_g = _square(value), _square(slope)
        norm_z, norm_g = (s.clamp(min=_FLOOR).sqrt() for s in (square_z, square_g))
        # below its floor a norm is a constant
        inverse_z = torch.where(square_z >= _FLOOR, 1 / norm_z, 0)
        inverse_g = torch.where(square_g >= _FLOOR, 1 / norm_g, 0)
        inner = (along * slope).flatten(1).sum(1).view_as(rate)
        to_z = along - rate / norm_g * inner * inverse_z * value
        to_gradient = rate * norm_z / norm_g * (inner * inverse_g * inverse_g * slope - along)
    return to_z.to(z.dtype), to_gradient.to(gradient.dtype), None, None, None


align_update.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "hcma_fast::align_update_", mutates_args=("z",), device_types=("cpu", "mps")
)
def align_update_in_place_op(
    z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool
) -> None:
    """What :func:`align_update_` calls."""
    require_contiguous(z=z)
    z.copy_(align_update_reference(z, gradient, table, step, normalized))


align_update_in_place_op.register_kernel("cuda")(align_update_in_place_cuda)


@align_update_in_place_op.register_fake
def _(z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool) -> None:
    return None


def align_update_(
    z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool
) -> None:
    """As :func:`align_update_reference`, written over ``z``, which is contiguous.

    Raises:
        UsageError: ``z`` is not contiguous, or autograd would have to record this.
    """
    require_no_gradient(z, gradient)
    align_update_in_place_op(z, gradient, table, step, normalized)
