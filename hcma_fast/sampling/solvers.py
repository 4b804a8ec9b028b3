"""Solvers as tables: a function from a number of steps to coefficients, and nothing else.

Each function makes a :class:`SolverTable` in float64 on the host; ``specs.Column`` says what its
columns mean, and :mod:`hcma_fast.kernels.update_sums` computes the step from them. What belongs
to the request rather than to the solver (rates of alignment, gates, guidance) is in
:mod:`hcma_fast.sampling.schedule`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor

from hcma_fast.errors import UsageError
from hcma_fast.kernels.update_sums import NEUTRAL
from hcma_fast.schedule import STEPS_OFFSET, TRAIN_STEPS, alphas_cumprod, check_steps
from hcma_fast.specs import Column

#: Adams-Bashforth weights of [current, previous, 2 back, 3 back] by the length of the history
_MULTISTEP = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_NEXT = slice(Column.NEXT_0, Column.NEXT_3 + 1)


class Evaluation(NamedTuple):
    """One evaluation of a :class:`SolverTable`."""

    timestep: int
    step: int
    aligns: bool


@dataclass(frozen=True, eq=False)
class SolverTable:
    """What a solver does in each of its K evaluations, as host tensors.

    A table equals itself alone: tensors have no single truth, and tables are keys of caches.
    """

    timesteps: Tensor
    """(K,) int64"""
    step_index: Tensor
    """(K,) int64, the step that an evaluation belongs to; 0, 0, 1, 2 ... for PLMS"""
    aligns: Tensor
    """(K,) bool: the alignment runs once per step, at its first evaluation"""
    columns: Tensor
    """(K, COLUMNS) float64; those before ``Column.PREDICTION_Z`` are not the solver's"""

    def __len__(self) -> int:
        return len(self.timesteps)

    def first(self, count: int | None) -> SolverTable:
        """The first evaluations alone; None for all."""
        parts = (self.timesteps, self.step_index, self.aligns, self.columns)
        return SolverTable(*(part[:count] for part in parts))

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """As plain numbers, for loops on the host."""
        parts = (self.timesteps, self.step_index, self.aligns)
        return [Evaluation(*row) for row in zip(*(p.tolist() for p in parts), strict=True)]


Solver = Callable[[int], SolverTable]


def _kept(solver: Solver) -> Solver:
    """Checks the number of steps, and keeps the tables."""
    tables = lru_cache(maxsize=32)(solver)

    @wraps(solver)
    def table_of(steps: int) -> SolverTable:
        return tables(check_steps(steps))

    return table_of


@_kept
def plms(steps: int) -> SolverTable:
    """Pseudo linear multistep, as Stable Diffusion v1 runs it: S steps, S + 1 evaluations.

    Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds",
    arXiv:2202.09778, Eq. 9 and 12. Evaluation 1 corrects the first step: it starts again from the
    latent of evaluation 0, with the mean of both predictions. Kept, so do not modify it.

    Raises:
        UsageError: not a whole number, fewer than 2 or more than 999 steps.
    """
    descending, stride = _uniform_timesteps(steps)
    times = torch.tensor([descending[0], *descending[1:2], *descending[1:]])
    count = len(times)
    corrector = torch.arange(count) == 1
    start = times.where(~corrector, times[0])
    columns = _neutral(count)
    scale, columns[:, Column.NEXT_SCALE] = _transfer(start, start - stride)
    columns[:, Column.NEXT_Z] = scale.where(~corrector, 0)
    columns[:, Column.NEXT_STORED] = scale.where(corrector, 0)
    columns[:, _NEXT] = torch.tensor(
        [_MULTISTEP[min(max(k - 1, 0), 3)] for k in range(count)], dtype=torch.float64
    )
    columns[1, _NEXT] = torch.tensor((0.5, 0.5, 0.0, 0.0), dtype=torch.float64)
    columns[:, Column.PUSHES] = (~corrector).double()
    return SolverTable(times, (torch.arange(count) - 1).clamp(min=0), ~corrector, columns)


@_kept
def ddim(steps: int) -> SolverTable:
    """Deterministic DDIM (Song et al. 2021, arXiv:2010.02502, Eq. 12), an evaluation per step.

    Kept, so do not modify it.

    Raises:
        UsageError: see :func:`plms`.
    """
    descending, stride = _uniform_timesteps(steps)
    times = torch.tensor(descending)
    columns = _neutral(steps)
    columns[:, Column.NEXT_Z], columns[:, Column.NEXT_SCALE] = _transfer(times, times - stride)
    return SolverTable(times, torch.arange(steps), torch.ones(steps, dtype=torch.bool), columns)


@_kept
def dpmpp_2m(steps: int) -> SolverTable:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2), uniform in lambda.

    lambda = log(alpha / sigma); the timesteps are those nearest to equal distances from t = 981 to
    t = 1. The last step is of first order and ends at t = 0. Kept, so do not modify it.

    Raises:
        UsageError: not a whole number from 2 to 999, or so many steps that two timesteps coincide.
    """
    abar = alphas_cumprod()
    lambdas = 0.5 * (abar / (1 - abar)).log()
    wanted = torch.linspace(float(lambdas[_FIRST]), float(lambdas[_LAST]), steps).double()
    times = (lambdas.unsqueeze(0) - wanted.unsqueeze(1)).abs().argmin(1)
    if len(times.unique()) < steps:
        raise UsageError(
            "two of these steps would be at the same timestep",
            value=steps,
            remedy="Use fewer steps, or another solver.",
        )
    return dpmpp_2m_table(times, torch.cat([abar[times], abar[:1]]))


_FIRST, _LAST = 981, 1


def dpmpp_2m_table(timesteps: Tensor, abar: Tensor) -> SolverTable:
    """DPM-Solver++(2M) from noise level to noise level.

    Args:
        timesteps: (K,) int64; abar: (K + 1,) float64, at each of them and at the end.
    """
    count = len(timesteps)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    step = (alpha / sigma).log().diff()
    columns = _neutral(count)
    columns[:, Column.PREDICTION_Z] = 1 / alpha[:-1]
    columns[:, Column.PREDICTION_EPS] = -sigma[:-1] / alpha[:-1]
    columns[:, Column.NEXT_Z] = sigma[1:] / sigma[:-1]
    columns[:, Column.NEXT_SCALE] = -alpha[1:] * torch.expm1(-step)
    # the share of the last change of the prediction; the first and the last step are first order
    share = torch.zeros(count, dtype=torch.float64)
    share[1:-1] = 0.5 * step[1:-1] / step[:-2]
    columns[:, Column.NEXT_0], columns[:, Column.NEXT_1] = 1 + share, -share
    every = torch.ones(count, dtype=torch.bool)
    return SolverTable(timesteps, torch.arange(count), every, columns)


def _neutral(count: int) -> Tensor:
    """(count, COLUMNS): rows that step to the prediction-free latent; solvers fill in theirs."""
    return torch.tensor(NEUTRAL, dtype=torch.float64).repeat(count, 1)


def _uniform_timesteps(steps: int) -> tuple[list[int], int]:
    """Timesteps uniform in t, descending, and the distance between them."""
    stride = TRAIN_STEPS // steps
    return [i * stride + STEPS_OFFSET for i in reversed(range(steps))], stride


def _transfer(now: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the latent and of the noise from one timestep to a later one (PLMS, Eq. 9)."""
    abar = alphas_cumprod()
    start, end = abar[now], abar[later.clamp(min=0)]
    denominator = start * (1 - end).sqrt() + (start * (1 - start) * end).sqrt()
    return (end / start).sqrt(), -(end - start) / denominator
