"""The update of one evaluation in plain torch operators: sums of few terms.

Which terms there are is known on the host, so those without an effect cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hcma_fast.kernels.launch import working_dtype
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


def columns_of(rows: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The columns of ``rows`` (B, COLUMNS), each as a factor of images of ``dim`` dimensions."""
    shape = (-1, *[1] * (dim - 1))
    return tuple(column.view(shape) for column in rows.unbind(1))


class Update(NamedTuple):
    """One evaluation's update: of each sum of ``specs.Column`` the terms that have an effect."""

    guidance: Factor
    prediction: Terms
    """without any it is the predicted noise"""
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
    if len(sums["prediction"]) == 1 and factors[Column.PREDICTION_EPS] is None:
        sums["prediction"] = ()
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
    prediction = eps
    if update.prediction:
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
