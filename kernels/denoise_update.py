"""Guidance, the solver's combination and the step in one pass (paper Eq. 9).

Everything that changes from evaluation to evaluation is a row of the image's plan
(``specs.Column``), read at the image's counter on the device, so that one captured launch replays
over the whole trajectory. On CPU tensors the op runs the reference, since Triton needs a GPU; on
CUDA tensors the kernel. The exported step graph computes the reference, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from hcma_fast.specs import HISTORY, PLAN_COLUMNS, Column

_ONE = (
    Column.ACTIVE,
    Column.PREDICTION_EPS,
    Column.NEXT_Z,
    Column.NEXT_SCALE,
    Column.NEXT_0,
    Column.STORED_Z,
    Column.PUSHES,
)
NEUTRAL = tuple(float(column in _ONE) for column in range(PLAN_COLUMNS))
"""For each column the value with which it can be left out of the update."""
EVERY = (True,) * PLAN_COLUMNS

Factor = Any
"""A number for all images, or a tensor with one for each; None is 1"""
Terms = tuple[tuple[int, Factor], ...]
"""Operands and their factors"""

_Z, _STORED, _MOVE, _NOISE, _PREDICTION, _PAST = range(6)
_PARTS: dict[str, tuple[tuple[int, int], ...]] = {
    "prediction": ((_PREDICTION, Column.PREDICTION_EPS), (_Z, Column.PREDICTION_Z)),
    "combined": (
        (_PREDICTION, Column.NEXT_0),
        *((_PAST + back, Column.NEXT_1 + back) for back in range(HISTORY)),
    ),
    "moved": (
        (_Z, Column.NEXT_Z),
        (_STORED, Column.NEXT_STORED),
        (_MOVE, Column.NEXT_MOVE),
        (_NOISE, Column.NEXT_NOISE),
    ),
    "held": (
        (_Z, Column.STORED_Z),
        (_STORED, Column.STORED_STORED),
        (_MOVE, Column.STORED_MOVE),
        (_NOISE, Column.STORED_NOISE),
        (_PREDICTION, Column.STORED_0),
        *((_PAST + back, Column.STORED_1 + back) for back in range(HISTORY)),
    ),
}
"""Which column is whose factor; the first of each part is the only one with the neutral value 1."""

_BLOCK = 1024


def columns_of(rows: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The columns of ``rows`` (B, COLUMNS), each as a factor of images of ``dim`` dimensions."""
    shape = (-1, *[1] * (dim - 1))
    return tuple(column.view(shape) for column in rows.unbind(1))


class Update(NamedTuple):
    """One evaluation's update: of each sum of ``specs.Column`` the terms that have an effect."""

    guidance: Factor
    prediction: Terms
    combined: Terms
    moved: Terms
    scale: Factor
    held: Terms
    """without any the stored latent stays as it is"""
    pushes: Factor
    active: Factor
    shared: bool
    """all factors are numbers"""


def update_of(
    columns: Sequence[float] | Sequence[Tensor],
    used: Sequence[bool] = EVERY,
    *,
    holds: bool = True,
) -> Update:
    """The update by the columns of a row.

    Args:
        columns: numbers, for all images, or tensors of :func:`columns_of`.
        used: for each whether it differs from ``NEUTRAL`` somewhere. The others are left out, which
            changes no result.
        holds: whether a later evaluation reads the stored latent.
    """
    shared = not isinstance(columns[0], Tensor)
    if shared:
        used = [column != neutral for column, neutral in zip(columns, NEUTRAL, strict=True)]
    factors: list[Factor] = [
        column if needed else (None if neutral else 0.0)
        for column, needed, neutral in zip(columns, used, NEUTRAL, strict=True)
    ]
    sums = {}
    for name, part in _PARTS.items():
        terms = tuple((operand, factors[column]) for operand, column in part)
        # a number 0 has no effect; a sum keeps its first term
        effective = tuple(term for term in terms if isinstance(term[1], Tensor) or term[1] != 0)
        sums[name] = effective or terms[:1]
    if not holds:
        sums["held"] = ()
    return Update(
        **sums,
        guidance=columns[Column.GUIDANCE],
        scale=columns[Column.NEXT_SCALE],
        pushes=factors[Column.PUSHES],
        active=factors[Column.ACTIVE],
        shared=shared,
    )


def _sum(terms: Terms, operands: Sequence[Tensor | None], shared: bool) -> Tensor:
    total: Tensor | None = None
    for operand, factor in terms:
        value = operands[operand]
        if value is None:
            continue
        if total is None:
            total = value if factor is None else factor * value
        elif shared:
            total = torch.add(total, value, alpha=factor)
        else:
            total = torch.addcmul(total, factor, value)
    if total is None:
        # the sum of nothing but an input that was left out
        z = operands[_Z]
        assert z is not None
        total = torch.zeros_like(z)
    return total


def denoise_update_rows(
    z: Tensor,
    stored: Tensor,
    history: Sequence[Tensor],
    eps_uncond: Tensor | None,
    eps_cond: Tensor,
    move: Tensor | None,
    noise: Tensor | None,
    update: Update,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """The update of one evaluation; ``specs.Column`` has the formula.

    Args:
        z, stored: (B, ...); history: HISTORY times (B, ...), the newest first; eps_uncond,
        eps_cond: (B, ...) predictions, the first None without guidance; move, noise: (B, ...), None
        is 0. float64 in gives float64 out.

    Returns:
        z, stored and history of the next evaluation; those that do not change may be inputs.
    """
    if update.shared and update.active == 0:
        return z, stored, history
    dtype, shared = working_dtype(z.dtype), update.shared
    wide, kept, eps, past = z, stored, eps_cond, history
    if z.dtype != dtype or eps.dtype != dtype or stored.dtype != dtype:
        wide, kept, eps = z.to(dtype), stored.to(dtype), eps_cond.to(dtype)
        past = [earlier.to(dtype) for earlier in history]
    if eps_uncond is not None:
        unconditional = eps_uncond if eps_uncond.dtype == dtype else eps_uncond.to(dtype)
        eps = unconditional + update.guidance * (eps - unconditional)
    prediction = _sum(update.prediction, (wide, kept, move, noise, eps), shared)
    operands = (wide, kept, move, noise, prediction, *past)
    combined = _sum(update.combined, operands, shared)
    moved = _sum(update.moved, operands, shared)
    scale = update.scale
    if shared:
        moved = torch.add(moved, combined, alpha=scale)
    else:
        moved = torch.addcmul(moved, scale, combined)
    held = _sum(update.held, operands, shared) if update.held else kept
    recent: Sequence[Tensor] = (prediction, *past[: HISTORY - 1])
    pushes, active = update.pushes, update.active
    if not shared and pushes is not None:
        pushed = pushes != 0
        recent = [torch.where(pushed, *pair) for pair in zip(recent, past, strict=True)]
    elif pushes == 0:
        recent = past
    if not shared and active is not None:
        # a factor of 0 would not keep a prediction that is not finite out
        running = active != 0
        moved, held = torch.where(running, moved, wide), torch.where(running, held, kept)
    if past is not history:
        moved, held = moved.to(z.dtype), held.to(stored.dtype)
        recent = [new.to(old.dtype) for new, old in zip(recent, history, strict=True)]
    return moved, held, recent


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
    """:func:`denoise_update_rows` by the plan of each image at its counter.

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
