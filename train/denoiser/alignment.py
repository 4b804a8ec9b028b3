"""Aligned latents to train a denoiser on: line 12 of the paper's Algorithm 1."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hcma_fast.models.aligner import AlignStep
from hcma_fast.schedule import alphas_cumprod


class Conditions(Protocol):
    """What B latents are aligned with; embeddings are pooled."""

    @property
    def caption(self) -> Tensor:
        """(B, d)"""

    @property
    def boxes(self) -> Tensor:
        """(B, M, 4)"""

    @property
    def mask(self) -> Tensor:
        """(B, M)"""

    @property
    def labels(self) -> Tensor:
        """(B, M, d)"""


def align_rows(
    align: AlignStep,
    z: Tensor,
    conditions: Conditions,
    timesteps: Tensor,
    rows: Tensor,
    eta0: Tensor,
    lambdas: Tensor,
) -> Tensor:
    """z (B, C, h, w) with some rows moved by Eq. 8, at eta0 * sqrt(1 - abar_t).

    Where the denoiser is not told caption or boxes, the alignment is: so it is in guidance's
    unconditional half. The result carries no gradient.

    Args:
        timesteps: (B,) int64; rows: (n,) int64; eta0: (n,); lambdas: (n, 2), global and local.
    """
    if not len(rows):
        return z
    at = timesteps[rows]
    eta = eta0 * (1 - alphas_cumprod().to(z.device)[at]).sqrt().float()
    mask = conditions.mask[rows]
    moved, *_ = align(
        z[rows],
        conditions.caption[rows],
        conditions.labels[rows],
        align.aligner.region_map(conditions.boxes[rows], mask),
        mask,
        eta,
        lambdas,
        at,
    )
    return z.index_copy(0, rows, moved.detach())
