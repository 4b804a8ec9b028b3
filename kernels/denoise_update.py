"""Guidance, PLMS combination and latent update in one pass (paper Eq. 9; PLMS as in schedule.py).

Everything that changes from evaluation to evaluation is a row of a device table, read by a device
counter, so that one captured launch replays over the whole trajectory. On CPU tensors the op runs
the reference, since Triton needs a GPU; on CUDA tensors the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcma_fast.errors import UsageError
from hcma_fast.kernels.launch import (
    Launch,
    argument,
    constexpr,
    jit,
    require_contiguous,
    require_no_gradient,
    tl,
    working_dtype,
)
from hcma_fast.kernels.step_table import rows_at, strides
from hcma_fast.schedule import PLMSTable

RING = 3
"""Slots of the history: PLMS looks back as far."""

COLUMNS = 10
"""guidance scale; weight of the current prediction; weights of the three slots; sample scale; noise
scale; slot to write, -1 for none; whether to start from the stored sample; whether to store it."""

_BLOCK = 1024


def denoise_table(table: PLMSTable, guidance_scale: float, rows: int | None = None) -> Tensor:
    """The table of :func:`denoise_update_` for one setting, (1, K, 10) float64 on the host.

    Weights are by physical slot, so that nobody shifts a history. With ``rows`` > K, rows that
    change nothing follow, so that requests of different lengths make one batch (``torch.cat``).

    Raises:
        UsageError: ``rows`` is less than K.
    """
    count = len(table)
    rows = count if rows is None else rows
    if rows < count:
        raise UsageError(
            f"the schedule has {count} evaluations", value=rows, remedy="Give at least as many."
        )
    out = torch.zeros(1, rows, COLUMNS, dtype=torch.float64)
    out[0, :, 5] = 1
    out[0, :, 7] = -1
    pushed = 0
    for k in range(count):
        row = out[0, k]
        row[0] = guidance_scale
        row[1] = table.history_weights[k, 0]
        for back in range(1, min(pushed, RING) + 1):
            row[2 + (pushed - back) % RING] = table.history_weights[k, back]
        row[5], row[6] = table.sample_scale[k], table.noise_scale[k]
        if table.pushes_history[k]:
            row[7] = pushed % RING
            pushed += 1
        row[8] = table.uses_stored_sample[k]
        row[9] = k + 1 < count and table.uses_stored_sample[k + 1]
    return out


def denoise_update_reference(
    z: Tensor,
    history: Tensor,
    stored: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    table: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """eps = eps_u + s (eps_c - eps_u); z' = a z_ref + b (w_0 eps + sum_j w_j history_j).

    Args:
        z, stored: (B, ...), the latent and the one that the corrector starts from; history:
        (3, B, ...); eps_uncond, eps_cond: (B, ...), the first None without guidance; table:
        (T, K, 10); step: (S,) integers; T and S are 1 or B. What has the weight 0 is not looked
        at. A step outside the table changes nothing. float64 in gives float64 out.

    Returns:
        z, history and stored of the next evaluation.
    """
    dtype = working_dtype(z.dtype)
    rows, inside = rows_at(table.to(dtype), step, len(z))
    shape = (-1, *[1] * (z.dim() - 1))
    guidance, *weights, sample_scale, noise_scale, slot, uses, stores = (
        column.view(shape) for column in rows.unbind(1)
    )
    inside = inside.view(shape)
    eps = eps_cond.to(dtype)
    if eps_uncond is not None:
        unconditional = eps_uncond.to(dtype)
        eps = unconditional + guidance * (eps - unconditional)
    combined = weights[0] * eps
    for weight, past in zip(weights[1:], history, strict=True):
        combined = combined + torch.where(weight == 0, 0, weight * past.to(dtype))
    start = torch.where(uses != 0, stored.to(dtype), z.to(dtype))
    moved = sample_scale * start + torch.where(noise_scale == 0, 0, noise_scale * combined)
    slots = torch.arange(RING, device=z.device, dtype=dtype).view(-1, *[1] * z.dim())
    return (
        torch.where(inside, moved.to(z.dtype), z),
        torch.where(inside & (slots == slot), eps.to(history.dtype), history),
        torch.where(inside & (stores != 0), z.to(stored.dtype), stored),
    )


@jit
def _denoise_update_kernel(
    z: argument,
    history: argument,
    stored: argument,
    eps_uncond: argument,
    eps_cond: argument,
    table: argument,
    step: argument,
    size: argument,
    steps: argument,
    slot_stride: argument,
    table_stride: argument,
    step_stride: argument,
    GUIDED: constexpr,
    COLUMNS: constexpr,
    BLOCK: constexpr,
) -> None:
    image = tl.program_id(1).to(tl.int64)
    at = tl.load(step + image * step_stride).to(tl.int64)
    inside = (at >= 0) & (at < steps)
    row = table + image * table_stride + tl.where(inside, at, 0) * COLUMNS
    sample_scale = tl.load(row + 5)
    noise_scale = tl.load(row + 6)
    slot = tl.load(row + 7).to(tl.int32)
    uses = tl.load(row + 8) != 0
    stores = tl.load(row + 9) != 0

    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = image * size + element
    # how far to read and write: not at all where the table says so
    limit = tl.where(inside, size, 0)
    needed = tl.where(noise_scale != 0, limit, tl.where(slot >= 0, limit, 0))
    eps = tl.load(eps_cond + here, mask=element < needed, other=0).to(tl.float32)
    if GUIDED:
        unconditional = tl.load(eps_uncond + here, mask=element < needed, other=0).to(tl.float32)
        eps = unconditional + tl.load(row) * (eps - unconditional)
    combined = tl.load(row + 1) * eps
    for back in tl.static_range(3):
        weight = tl.load(row + 2 + back)
        known = tl.where(weight != 0, limit, 0)
        past = tl.load(history + back * slot_stride + here, mask=element < known, other=0)
        combined += weight * past.to(tl.float32)
    # the corrector starts from the stored latent, and the other evaluations from the current one
    from_z, from_stored = tl.where(uses, 0, limit), tl.where(uses, limit, 0)
    current = tl.load(z + here, mask=element < from_z, other=0).to(tl.float32)
    start = tl.load(stored + here, mask=element < from_stored, other=0).to(tl.float32) + current
    tl.store(z + here, sample_scale * start + noise_scale * combined, mask=element < limit)
    pushed = tl.where(slot >= 0, limit, 0)
    tl.store(history + slot * slot_stride + here, eps, mask=element < pushed)
    tl.store(stored + here, current, mask=element < tl.where(stores, limit, 0))


def denoise_update_launch(
    z: Tensor,
    history: Tensor,
    stored: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    table: Tensor,
    step: Tensor,
) -> Launch:
    """The launch that updates ``z``, ``history`` and ``stored``; see :func:`denoise_update_`."""
    batch, size = len(z), z[0].numel()
    require_contiguous(z=z, history=history, stored=stored)
    eps_cond = eps_cond.contiguous()
    arguments: dict[str, Tensor | int] = {
        "z": z,
        "history": history,
        "stored": stored,
        # not read without guidance, but a kernel's pointer is never None
        "eps_uncond": eps_cond if eps_uncond is None else eps_uncond.contiguous(),
        "eps_cond": eps_cond,
        "table": table.float().contiguous(),
        "step": step.contiguous(),
        "size": size,
        "steps": table.shape[1],
        "slot_stride": batch * size,
        **strides(table, step, batch),
    }
    constants = {"GUIDED": eps_uncond is not None, "COLUMNS": COLUMNS, "BLOCK": _BLOCK}
    grid = (-(-size // _BLOCK), batch)
    return Launch(_denoise_update_kernel, grid, arguments, constants, num_warps=4)


def denoise_update_cuda(
    z: Tensor,
    history: Tensor,
    stored: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    """As :func:`denoise_update_`, by the Triton kernel.

    Raises:
        BackendError, UsageError: see :meth:`Launch.run`; a target that is not contiguous.
    """
    denoise_update_launch(z, history, stored, eps_uncond, eps_cond, table, step).run()


@torch.library.custom_op(
    "hcma_fast::denoise_update_",
    mutates_args=("z", "history", "stored"),
    device_types=("cpu", "mps"),
)
def denoise_update_op(
    z: Tensor,
    history: Tensor,
    stored: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    """What :func:`denoise_update_` calls."""
    require_contiguous(z=z, history=history, stored=stored)
    results = denoise_update_reference(z, history, stored, eps_uncond, eps_cond, table, step)
    for target, result in zip((z, history, stored), results, strict=True):
        target.copy_(result)


denoise_update_op.register_kernel("cuda")(denoise_update_cuda)


@denoise_update_op.register_fake
def _(
    z: Tensor,
    history: Tensor,
    stored: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    return None


def denoise_update_(
    z: Tensor,
    history: Tensor,
    stored: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    """As :func:`denoise_update_reference`, written over ``z``, ``history`` and ``stored``.

    The counter is the caller's to advance, after the launch.

    Raises:
        UsageError: one of the three is not contiguous, or autograd would have to record this.
    """
    require_no_gradient(z, history, stored, eps_uncond, eps_cond)
    denoise_update_op(z, history, stored, eps_uncond, eps_cond, table, step)
