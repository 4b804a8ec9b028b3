"""Guidance, the solver's combination and the step in one pass (paper Eq. 9).

Everything that changes from evaluation to evaluation is a row of the image's plan
(``specs.Column``), read at the image's counter on the device, so that one captured launch replays
over the whole trajectory. On CPU tensors the op runs the reference, since Triton needs a GPU; on
CUDA tensors the kernel. The exported step graph computes the reference, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
from hcma_fast.kernels.update_sums import columns_of, denoise_update_rows, update_of
from hcma_fast.specs import HISTORY, PLAN_COLUMNS

_BLOCK = 1024


def denoise_update_reference(
    z: Tensor,
    stored: Tensor,
    history: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    move: Tensor | None,
    noise: Tensor | None,
    plan: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`update_sums.denoise_update_rows` by the plan of each image at its counter.

    Args:
        plan: (T, K, COLUMNS); step: (S,) integers; T and S are 1 or B. A step outside the plan
        changes nothing.
    """
    rows, inside = rows_at(plan.to(working_dtype(z.dtype)), step, len(z))
    # a row that is not active and pushes nothing changes nothing
    idle = torch.zeros_like(rows)
    update = update_of(columns_of(torch.where(inside.unsqueeze(1), rows, idle), z.dim()))
    moved, held, recent = denoise_update_rows(
        z, stored, history.unbind(1), eps_uncond, eps_cond, move, noise, update
    )
    return moved, held, torch.stack([*recent], 1)


@jit
def _denoise_update_kernel(
    z: argument,
    stored: argument,
    history: argument,
    eps_uncond: argument,
    eps_cond: argument,
    move: argument,
    noise: argument,
    plan: argument,
    step: argument,
    size: argument,
    steps: argument,
    table_stride: argument,
    step_stride: argument,
    GUIDED: constexpr,
    MOVES: constexpr,
    NOISY: constexpr,
    COLUMNS: constexpr,
    HISTORY: constexpr,
    BLOCK: constexpr,
) -> None:
    # numbers added to `row` are those of specs.Column
    image = tl.program_id(1).to(tl.int64)
    at = tl.load(step + image * step_stride).to(tl.int64)
    inside = (at >= 0) & (at < steps)
    row = plan + image * table_stride + tl.where(inside, at, 0) * COLUMNS
    active = inside & (tl.load(row + 5) != 0)
    pushes = inside & (tl.load(row + 25) != 0)

    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = image * size + element
    # how far to read and write: not at all where the plan says so
    limit = tl.where(active, size, 0)
    pushed = tl.where(pushes, size, 0)
    needed = tl.where(active | pushes, size, 0)
    eps = tl.load(eps_cond + here, mask=element < needed, other=0).to(tl.float32)
    if GUIDED:
        unconditional = tl.load(eps_uncond + here, mask=element < needed, other=0).to(tl.float32)
        eps = unconditional + tl.load(row + 4) * (eps - unconditional)
    current = tl.load(z + here, mask=element < needed, other=0).to(tl.float32)
    prediction = tl.load(row + 6) * current + tl.load(row + 7) * eps

    of_stored, keeps_stored = tl.load(row + 9), tl.load(row + 18)
    known = tl.where((of_stored != 0) | (keeps_stored != 0), limit, 0)
    kept = tl.load(stored + here, mask=element < known, other=0).to(tl.float32)
    moved = tl.load(row + 8) * current + of_stored * kept
    held = tl.load(row + 17) * current + keeps_stored * kept
    if MOVES:
        by = tl.load(move + here, mask=element < limit, other=0).to(tl.float32)
        moved += tl.load(row + 10) * by
        held += tl.load(row + 19) * by
    if NOISY:
        drawn = tl.load(noise + here, mask=element < limit, other=0).to(tl.float32)
        moved += tl.load(row + 11) * drawn
        held += tl.load(row + 20) * drawn

    combined = tl.load(row + 13) * prediction
    held += tl.load(row + 21) * prediction
    newer = prediction
    for back in tl.static_range(HISTORY):
        slot = history + image * HISTORY * size + back * size + element
        past = tl.load(slot, mask=element < needed, other=0).to(tl.float32)
        combined += tl.load(row + 14 + back) * past
        held += tl.load(row + 22 + back) * past
        tl.store(slot, newer, mask=element < pushed)
        newer = past
    tl.store(z + here, moved + tl.load(row + 12) * combined, mask=element < limit)
    tl.store(stored + here, held, mask=element < limit)


def denoise_update_launch(
    z: Tensor,
    stored: Tensor,
    history: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    move: Tensor | None,
    noise: Tensor | None,
    plan: Tensor,
    step: Tensor,
) -> Launch:
    """The launch that updates ``z``, ``stored`` and ``history``; see :func:`denoise_update_`."""
    batch, size = len(z), z[0].numel()
    require_contiguous(z=z, stored=stored, history=history)
    eps_cond = eps_cond.contiguous()
    arguments: dict[str, Tensor | int] = {
        "z": z,
        "stored": stored,
        "history": history,
        # a pointer that is not read may not be None
        "eps_uncond": eps_cond if eps_uncond is None else eps_uncond.contiguous(),
        "eps_cond": eps_cond,
        "move": z if move is None else move.contiguous(),
        "noise": z if noise is None else noise.contiguous(),
        "plan": plan.float().contiguous(),
        "step": step.contiguous(),
        "size": size,
        "steps": plan.shape[1],
        **strides(plan, step, batch),
    }
    constants = {
        "GUIDED": eps_uncond is not None,
        "MOVES": move is not None,
        "NOISY": noise is not None,
        "COLUMNS": PLAN_COLUMNS,
        "HISTORY": HISTORY,
        "BLOCK": _BLOCK,
    }
    grid = (-(-size // _BLOCK), batch)
    return Launch(_denoise_update_kernel, grid, arguments, constants, num_warps=4)


def denoise_update_cuda(
    z: Tensor,
    stored: Tensor,
    history: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    move: Tensor | None,
    noise: Tensor | None,
    plan: Tensor,
    step: Tensor,
) -> None:
    """As :func:`denoise_update_`, by the Triton kernel.

    Raises:
        BackendError, UsageError: see :meth:`Launch.run`; a target that is not contiguous.
    """
    denoise_update_launch(z, stored, history, eps_uncond, eps_cond, move, noise, plan, step).run()


@torch.library.custom_op(
    "hcma_fast::denoise_update_",
    mutates_args=("z", "stored", "history"),
    device_types=("cpu", "mps"),
)
def denoise_update_op(
    z: Tensor,
    stored: Tensor,
    history: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    move: Tensor | None,
    noise: Tensor | None,
    plan: Tensor,
    step: Tensor,
) -> None:
    """What :func:`denoise_update_` calls."""
    require_contiguous(z=z, stored=stored, history=history)
    moved, held, past = denoise_update_reference(
        z, stored, history, eps_uncond, eps_cond, move, noise, plan, step
    )
    stored.copy_(held)
    history.copy_(past)
    z.copy_(moved)


denoise_update_op.register_kernel("cuda")(denoise_update_cuda)


@denoise_update_op.register_fake
def _(
    z: Tensor,
    stored: Tensor,
    history: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    move: Tensor | None,
    noise: Tensor | None,
    plan: Tensor,
    step: Tensor,
) -> None:
    return None


def denoise_update_(
    z: Tensor,
    stored: Tensor,
    history: Tensor,
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    move: Tensor | None,
    noise: Tensor | None,
    plan: Tensor,
    step: Tensor,
) -> None:
    """As :func:`denoise_update_reference`, written over ``z``, ``stored`` and ``history``.

    The counter is the caller's to advance, after the launch.

    Raises:
        UsageError: one of the three is not contiguous, or autograd would have to record this.
    """
    require_no_gradient(z, stored, history, eps_uncond, eps_cond)
    denoise_update_op(z, stored, history, eps_uncond, eps_cond, move, noise, plan, step)
