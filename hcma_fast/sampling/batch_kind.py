"""What the images of a batch have in common, and what its update can leave out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hcma_fast.errors import InputError
from hcma_fast.kernels.denoise_update import NEUTRAL
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.sampling.solvers import SolverTable
from hcma_fast.specs import PLAN_COLUMNS, Column

_MOVES = [Column.NEXT_MOVE, Column.STORED_MOVE]


def used_columns(schedules: Sequence[Schedule]) -> list[tuple[bool, ...]]:
    """For each evaluation and column of the update: whether it has an effect for some image."""
    used = torch.zeros(max(len(s.table) for s in schedules), PLAN_COLUMNS, dtype=torch.bool)
    for schedule in schedules:
        count = len(schedule.table)
        used[:count] |= differing_columns(schedule.table)
        # behind its end an image waits for the others
        used[count:, [Column.ACTIVE, Column.PUSHES]] = True
    return [tuple(row) for row in used.tolist()]


@lru_cache(maxsize=64)
def differing_columns(table: SolverTable) -> Tensor:
    """(K, COLUMNS) bool: which columns of the update have an effect."""
    return table.columns != torch.tensor(NEUTRAL, dtype=torch.float64)


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
            moves=any(row[column] for row in used_columns(schedules) for column in _MOVES),
        )
