"""What the images of a batch have in common, and what its update can leave out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from hcma_fast.errors import InputError, UsageError
from hcma_fast.kernels.update_sums import NEUTRAL, Update, update_of
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.sampling.solvers import SolverTable
from hcma_fast.specs import PLAN_COLUMNS, Column

_MOVES = (Column.NEXT_MOVE, Column.STORED_MOVE)
_NOISE = (Column.NEXT_NOISE, Column.STORED_NOISE)


def used_columns(schedules: Sequence[Schedule]) -> list[tuple[bool, ...]]:
    """For each evaluation and column of the update: whether it has an effect for some image."""
    return _used_columns(_tables(schedules))


def _tables(schedules: Sequence[Schedule]) -> tuple[SolverTable, ...]:
    return tuple(dict.fromkeys([schedule.table for schedule in schedules]))


@lru_cache(maxsize=64)
def _used_columns(tables: tuple[SolverTable, ...]) -> list[tuple[bool, ...]]:
    used = torch.zeros(max(len(table) for table in tables), PLAN_COLUMNS, dtype=torch.bool)
    for table in tables:
        count = len(table)
        used[:count] |= table.columns != torch.tensor(NEUTRAL, dtype=torch.float64)
        # behind its end an image waits for the others
        used[count:, [Column.ACTIVE, Column.PUSHES]] = True
    return [tuple(row) for row in used.tolist()]


@lru_cache(maxsize=64)
def _uses(tables: tuple[SolverTable, ...], columns: tuple[int, ...]) -> bool:
    return any(row[column] for row in _used_columns(tables) for column in columns)


def holds(used: Sequence[Sequence[bool]]) -> list[bool]:
    """For each evaluation: whether a later one reads the latent that it stores."""
    found = [False]
    for row in reversed(used[1:]):
        read = row[Column.NEXT_STORED] or (found[-1] and row[Column.STORED_STORED])
        found.append(read)
    return found[::-1]


def shared_updates(schedule: Schedule) -> list[Update]:
    """The update of each evaluation, for images that all have this schedule."""
    return _shared_updates(schedule.table, schedule.guidance_scale)


@lru_cache(maxsize=64)
def _shared_updates(table: SolverTable, guidance: float) -> list[Update]:
    rows = table.columns.clone()
    rows[:, Column.GUIDANCE] = guidance
    later = holds(_used_columns((table,)))
    return [update_of(row, holds=held) for row, held in zip(rows.tolist(), later, strict=True)]


def check_deterministic(schedules: Sequence[Schedule]) -> None:
    """Refuse what the sampler does not do yet.

    Raises:
        UsageError: a solver that adds noise.
    """
    if _uses(_tables(schedules), _NOISE):
        raise UsageError(
            "this solver adds noise in its steps, which the sampler does not draw yet",
            remedy="Use a deterministic solver.",
        )


class Kind(NamedTuple):
    """What all evaluations of a batch have in common, and its launches and memory depend on."""

    dtype: torch.dtype
    """of latent and history"""
    repeats: bool
    """some image follows gradients of earlier steps"""
    recomputes: bool
    """the contexts are computed in every evaluation"""
    moves: bool
    """some image's solver uses the move of the alignment"""

    @classmethod
    def of(cls, schedules: Sequence[Schedule]) -> Kind:
        """That of a batch.

        Raises:
            InputError: its images keep their latents in different dtypes.
        """
        savings = [schedule.savings for schedule in schedules]
        dtypes = sorted({saving.latent_dtype for saving in savings})
        if len(dtypes) > 1:
            raise InputError(
                "images of one batch must keep their latents in the same dtype",
                value=dtypes,
                remedy="Give them the same latent_dtype.",
            )
        return cls(
            dtype=getattr(torch, dtypes[0]),
            repeats=any(saving.align_every > 1 for saving in savings),
            recomputes=any(not saving.contexts_once for saving in savings),
            moves=_uses(_tables(schedules), _MOVES),
        )
