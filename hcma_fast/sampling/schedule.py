"""A request's schedule: a solver's table, and what the request adds to each evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hcma_fast.config import AlignmentSettings
from hcma_fast.engine import Engine
from hcma_fast.errors import InputError
from hcma_fast.sampling.savings import EXACT, Savings
from hcma_fast.sampling.solvers import Solver, SolverTable, plms
from hcma_fast.schedule import alphas_cumprod, grounded_steps, inside_window
from hcma_fast.specs import PLAN_COLUMNS, PLAN_ROWS, Column, GraphName


def eta_table(table: SolverTable, settings: AlignmentSettings) -> Tensor:
    """Alignment rate per evaluation, (K,) float64: eta0 sqrt(1 - abar_t) inside the window, else 0.

    The window [start, end) holds shares of the steps.
    """
    steps = int(table.step_index[-1]) + 1
    inside = inside_window(table.step_index, steps, settings) & table.aligns
    rates = settings.eta0 * (1 - alphas_cumprod()[table.timesteps]).sqrt()
    return torch.where(inside, rates, torch.zeros_like(rates))


class Networks(NamedTuple):
    """Which networks an evaluation of a batch runs: equal ones are the same launches."""

    aligned: bool
    """`align`: some image's gradient is computed"""
    grounded: bool
    """`unet_grounded`, which some image needs, or `unet_plain`"""
    guided: bool
    """the UNet for both halves of the guidance, or for the conditional one"""


@dataclass(frozen=True)
class Schedule:
    """Solver table, alignment rate per evaluation, and how to weigh."""

    table: SolverTable
    etas: Tensor
    """(K,) float64"""
    lambdas: tuple[float, float]
    guidance_scale: float
    grounding_beta: float
    """share of the steps, from the first, with gated attention; cut to whole steps"""
    savings: Savings = EXACT

    def __post_init__(self) -> None:
        if self.etas.shape != self.table.timesteps.shape:
            raise InputError(
                "there must be one alignment rate per evaluation",
                value=tuple(self.etas.shape),
                remedy=f"Give {len(self.table)} of them, see sampling.schedule.eta_table.",
            )

    @classmethod
    def of(
        cls,
        num_inference_steps: int,
        settings: AlignmentSettings,
        savings: Savings = EXACT,
        solver: Solver = plms,
    ) -> Schedule:
        """The schedule of these steps and settings.

        Raises:
            UsageError: fewer than 2 or more than 999 steps.
        """
        table = solver(num_inference_steps)
        return cls(
            table,
            eta_table(table, settings),
            (settings.lambda_global, settings.lambda_local),
            settings.guidance_scale,
            settings.grounding_beta,
            savings,
        )

    @property
    def steps(self) -> int:
        """Steps; PLMS has an evaluation more."""
        return int(self.table.step_index[-1]) + 1

    @property
    def grounded_steps(self) -> int:
        """Steps with gated attention."""
        return grounded_steps(self.grounding_beta, self.steps)

    @property
    def grounded_unet_steps(self) -> int:
        """Steps that run `unet_grounded`, its gate open or closed."""
        return self.grounded_steps if self.savings.skip_closed_gate else self.steps

    @property
    def guided_steps(self) -> int:
        """Steps with classifier-free guidance: all, some from the first, or none."""
        if self.guidance_scale <= 1:
            return 0
        return max(1, round(self.savings.guidance_end * self.steps))

    def gates(self) -> Tensor:
        """Per evaluation, 1 with gated attention, 0 without: (K,) float32."""
        return (self.table.step_index < self.grounded_steps).float()

    def alignments(self) -> list[Literal["none", "computed", "repeated"]]:
        """Per evaluation, what becomes of the alignment.

        Where the `align` graph is run, losses are recorded; elsewhere the gradient is none, or that
        of an earlier step.
        """
        found: list[Literal["none", "computed", "repeated"]] = []
        moves = 0
        for rate, may in zip(self.etas.tolist(), self.table.aligns.tolist(), strict=True):
            if rate > 0:
                found.append("repeated" if moves % self.savings.align_every else "computed")
                moves += 1
            else:
                idle = may and not self.savings.skip_idle_alignment
                found.append("computed" if idle else "none")
        return found

    @cached_property
    def networks(self) -> tuple[Networks, ...]:
        """What the image alone needs, per evaluation."""
        grounded, guided = self.grounded_unet_steps, self.guided_steps
        steps = self.table.step_index.tolist()
        return tuple(
            Networks(what == "computed", step < grounded, step < guided)
            for what, step in zip(self.alignments(), steps, strict=True)
        )

    @cached_property
    def plan(self) -> Tensor:
        """All numbers of the trajectory, (PLAN_ROWS, PLAN_COLUMNS) float64; do not modify it.

        Rows behind the last evaluation change nothing.
        """
        count = len(self.table)
        plan = torch.zeros(PLAN_ROWS, PLAN_COLUMNS, dtype=torch.float64)
        plan[:count] = self.table.columns
        repeats = torch.tensor([what == "repeated" for what in self.alignments()])
        plan[:count, Column.TIMESTEP] = self.table.timesteps.double()
        plan[:count, Column.ETA] = self.etas.where(~repeats, 0)
        plan[:count, Column.REPEAT] = self.etas.where(repeats, 0)
        plan[:count, Column.GATE] = self.gates().double()
        plan[:, Column.GUIDANCE] = self.guidance_scale
        return plan


class StepLosses(NamedTuple):
    """Losses before one step's alignment; left on the device, so nothing waits for them."""

    step: int
    timestep: int
    loss_global: Tensor
    """(B,)"""
    loss_local: Tensor
    """(B, M), 0 for padding"""


def networks_of(running: Sequence[tuple[Schedule, int]]) -> Networks:
    """What images need at their own evaluations.

    Args:
        running: schedule and evaluation of each image that is not done.

    Raises:
        InputError: some need guidance, and others none.
    """
    needs = [schedule.networks[k] for schedule, k in running]
    if len({need.guided for need in needs}) > 1:
        raise InputError(
            "images of one batch must switch off the guidance at the same step",
            value=[(s.guidance_scale, s.savings.guidance_end) for s, _ in running],
            remedy="Give them the same guidance_end and number of steps, or the share 1; and "
            "all of them a guidance_scale above 1, or none.",
        )
    return Networks(
        aligned=any(need.aligned for need in needs),
        grounded=any(need.grounded for need in needs),
        guided=needs[0].guided,
    )


def evaluation_networks(schedules: Sequence[Schedule]) -> tuple[Networks, ...]:
    """Those of each evaluation of a batch that starts together, until its longest schedule ends.

    Raises:
        InputError: see :func:`networks_of`.
    """
    longest = max(len(schedule.table) for schedule in schedules)
    return tuple(
        networks_of([(s, k) for s in schedules if k < len(s.table)]) for k in range(longest)
    )


def fusable(engines: Mapping[GraphName, Engine], schedules: Sequence[Schedule]) -> bool:
    """Whether the step graphs are there, and can run images with these schedules as one batch.

    They guide and align always, know of no approximation, and leave the contexts to who calls
    them. Where a window leaves steps unaligned, the separate graphs save those alignments, which
    cost more than a call (docs/decisions.md).
    """
    return "step_grounded" in engines and all(_fits_step_graph(s) for s in schedules)


def _fits_step_graph(schedule: Schedule) -> bool:
    savings = schedule.savings
    exact = savings.contexts_once and savings.skip_closed_gate and not savings.approximate
    moves = schedule.etas[schedule.table.aligns] > 0
    idle = not savings.skip_idle_alignment
    aligned = bool(moves.all() or (idle and moves.any()))
    return exact and aligned and schedule.guidance_scale > 1
