"""The sampler: align, denoise, combine, step (paper Algorithm 1, lines 15 to 23, with PLMS)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hcma_fast.config import AlignmentSettings
from hcma_fast.engine import Engine
from hcma_fast.sampling.exported import step_plan
from hcma_fast.sampling.savings import EXACT, Savings
from hcma_fast.schedule import PLMSTable, eta_table, plms_table
from hcma_fast.specs import HISTORY, GraphName


@dataclass(frozen=True)
class Conditioning:
    """What stays fixed over the steps. C = 2B with guidance (unconditional half first), else B."""

    text_context: Tensor
    """(C, 77, W) keys and values of the caption in every attention layer"""
    grounding_context: Tensor
    """(C, M, W) those of the boxes"""
    caption_embedding: Tensor
    """(B, d)"""
    label_embeddings: Tensor
    """(B, M, d)"""
    regions: Tensor
    """(B, M, N)"""
    region_mask: Tensor
    """(B, M)"""
    boxes: Tensor
    """(B, M, 4)"""
    encoder_hidden_states: Tensor
    """(C, 77, d) of the captions: the contexts come from these and the boxes"""

    def halves(self) -> list[dict[str, Tensor]]:
        """See :func:`grounding_inputs`."""
        return grounding_inputs(
            self.boxes, self.region_mask, self.label_embeddings, self.encoder_hidden_states
        )


CONTEXTS = ("text_context", "grounding_context")


def grounding_inputs(
    boxes: Tensor, region_mask: Tensor, label_embeddings: Tensor, encoder_hidden_states: Tensor
) -> list[dict[str, Tensor]]:
    """What the `grounding` graph takes, per half of the guidance, the unconditional one first: it
    has no boxes. The arguments are those of :class:`Conditioning`."""
    states = encoder_hidden_states.split(len(boxes))
    masks = [torch.zeros_like(region_mask), region_mask][-len(states) :]
    fixed = {"boxes": boxes, "label_embeddings": label_embeddings}
    return [
        {**fixed, "region_mask": mask, "encoder_hidden_states": half}
        for mask, half in zip(masks, states, strict=True)
    ]


def ground(
    engines: Mapping[GraphName, Engine], halves: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Contexts of some halves of the guidance, one after the other, and regions of the last."""
    found = [engines["grounding"](half) for half in halves]
    joined = {name: torch.cat([half[name] for half in found]) for name in CONTEXTS}
    return {**joined, "regions": found[-1]["regions"]}


@dataclass(frozen=True)
class Schedule:
    """PLMS table, alignment rate per evaluation, and how to weigh."""

    table: PLMSTable
    etas: Tensor
    """(K,) float64"""
    lambdas: tuple[float, float]
    guidance_scale: float
    grounding_beta: float
    """share of the PLMS steps, from the first, with gated attention; rounded to whole steps"""
    savings: Savings = EXACT

    @classmethod
    def of(
        cls,
        num_inference_steps: int,
        settings: AlignmentSettings,
        savings: Savings = EXACT,
    ) -> Schedule:
        """The schedule of these steps and settings.

        Raises:
            UsageError: fewer than 2 or more than 999 steps.
        """
        return cls(
            plms_table(num_inference_steps),
            eta_table(num_inference_steps, settings),
            (settings.lambda_global, settings.lambda_local),
            settings.guidance_scale,
            settings.grounding_beta,
            savings,
        )

    @property
    def steps(self) -> int:
        """PLMS steps."""
        return int(self.table.step_index[-1]) + 1

    @property
    def grounded_steps(self) -> int:
        """PLMS steps with gated attention."""
        return round(self.grounding_beta * self.steps)

    @property
    def grounded_unet_steps(self) -> int:
        """PLMS steps that run `unet_grounded`, its gate open or closed."""
        return self.grounded_steps if self.savings.skip_closed_gate else self.steps

    @property
    def guided_steps(self) -> int:
        """PLMS steps with classifier-free guidance: all, some from the first, or none."""
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


@dataclass(frozen=True)
class StepLosses:
    """Losses before one PLMS step's alignment; left on the device, so nothing waits for them."""

    step: int
    timestep: int
    loss_global: Tensor
    """(B,)"""
    loss_local: Tensor
    """(B, M), 0 for padding"""


def sample(
    engines: Mapping[GraphName, Engine],
    z: Tensor,
    conditioning: Conditioning,
    schedule: Schedule,
    on_evaluation: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[StepLosses]]:
    """Run all evaluations from noise ``z`` (B, 4, h, w) to the clean, scaled latent.

    ``on_evaluation`` gets the evaluation's number and the new latent, and returns the latent to
    go on with.
    """
    table, batch, device = schedule.table, len(z), z.device
    guided = len(conditioning.text_context) == 2 * batch
    guided_steps = schedule.guided_steps if guided else 0
    narrow = schedule.savings.latent_dtype == "bfloat16"
    alignments, rates = schedule.alignments(), schedule.etas.tolist()
    lambdas = torch.tensor([schedule.lambdas] * batch, device=device)
    both = dict(vars(conditioning), lambdas=lambdas)
    conditional = both | {n: both[n][-batch:] for n in ("text_context", "grounding_context")}
    etas, times, gates = (
        of_evaluation.to(device).unsqueeze(1).expand(-1, 2 * batch)
        for of_evaluation in (schedule.etas.float(), table.timesteps, schedule.gates())
    )
    grounded_steps = schedule.grounded_unet_steps
    history: list[Tensor] = []
    losses: list[StepLosses] = []
    gradient = stored = z = _rounded(z) if narrow else z
    for k, row in enumerate(table.rows()):
        # align: once per PLMS step in the window, before the copy for guidance (Eq. 8)
        if alignments[k] == "computed":
            at = {"z": z, "eta": etas[k, :batch], "timestep": times[k, :batch]}
            aligned = engines["align"]({**both, **at})
            if rates[k]:
                if schedule.savings.align_every > 1:
                    gradient = (z - aligned["z_aligned"]) / rates[k]
                z = aligned["z_aligned"]
            losses.append(
                StepLosses(row.step, row.timestep, aligned["loss_global"], aligned["loss_local"])
            )
        elif alignments[k] == "repeated":
            z = torch.add(z, gradient, alpha=-rates[k])
        if narrow:
            z = _rounded(z)
        # denoise (Eq. 9): both halves of the guidance in one batch
        unet = engines["unet_grounded" if row.step < grounded_steps else "unet_plain"]
        twice = row.step < guided_steps
        doubled = torch.cat([z, z]) if twice else z
        rows = slice(len(doubled))
        at = {"sample": doubled, "timestep": times[k, rows], "grounding_gate": gates[k, rows]}
        fixed = both if twice else conditional
        if not schedule.savings.contexts_once:
            fixed = fixed | ground(engines, conditioning.halves()[0 if twice else -1 :])
        eps = unet({**fixed, **at})["noise_pred"]
        if twice:
            unconditional, wanted = eps.chunk(2)
            eps = unconditional + schedule.guidance_scale * (wanted - unconditional)
        # combine: this prediction and the history, by the weights of PLMS
        recent = [_rounded(eps) if narrow else eps, *history]
        combined = row.weights[0] * eps
        for weight, earlier in zip(row.weights[1:], history, strict=False):
            combined = torch.add(combined, earlier, alpha=weight)
        # step: the corrector starts again from the aligned latent of evaluation 0
        start = stored if row.uses_stored_sample else z
        stored = z
        z = torch.add(row.sample_scale * start, combined, alpha=row.noise_scale)
        if row.pushes_history:
            history = recent[:3]
        if on_evaluation is not None:
            z = on_evaluation(k, z)
        if narrow:
            z = _rounded(z)
    return z, losses


def _rounded(z: Tensor) -> Tensor:
    """What is left of it in bfloat16, as wide as it was."""
    return z.bfloat16().to(z.dtype)


def fusable(engines: Mapping[GraphName, Engine], schedules: Sequence[Schedule]) -> bool:
    """Whether the step graphs are there, and can run images with these schedules as one batch.

    They guide and align always, know of no approximation, have one table for all images and no
    gate to close, and leave the contexts to who calls them. Where a window leaves steps unaligned,
    the separate graphs save those alignments, which cost more than a call (docs/decisions.md).
    """
    first = schedules[0]
    savings = first.savings
    able = savings.contexts_once and savings.skip_closed_gate and not savings.approximate
    if "step_grounded" not in engines or not able or first.guidance_scale <= 1:
        return False
    moves = first.etas[first.table.aligns] > 0
    idle = not savings.skip_idle_alignment
    return bool(moves.all() or (idle and moves.any())) and all(
        other is first or _same_but_lambdas(first, other) for other in schedules
    )


def _same_but_lambdas(one: Schedule, other: Schedule) -> bool:
    settings = ("guidance_scale", "grounding_beta", "savings")
    return (
        all(getattr(one, name) == getattr(other, name) for name in settings)
        and torch.equal(one.table.timesteps, other.table.timesteps)
        and torch.equal(one.etas, other.etas)
    )


def halves_by_image(conditioning: Conditioning) -> dict[str, Tensor]:
    """As the step graphs take it: contexts (2B, T, W), half after half, become (B, 2, T, W)."""
    given, batch = dict(vars(conditioning)), len(conditioning.caption_embedding)
    for name in ("text_context", "grounding_context"):
        given[name] = given[name].unflatten(0, (2, batch)).transpose(0, 1)
    return given


def sample_fused(
    engines: Mapping[GraphName, Engine],
    z: Tensor,
    conditioning: Conditioning,
    schedule: Schedule,
    on_evaluation: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[StepLosses]]:
    """The same as :func:`sample` by the step graphs, one call per evaluation; guided only.

    The state goes in and comes out as it is: index and history stay where the engine left them. The
    graphs know of no savings.
    """
    table, device = schedule.table, z.device
    fixed = {name: value.contiguous() for name, value in halves_by_image(conditioning).items()}
    fixed["lambdas"] = torch.tensor([schedule.lambdas] * len(z), device=device)
    fixed["plan"] = step_plan(table, schedule.etas).to(device)
    fixed["guidance_scale"] = torch.tensor([schedule.guidance_scale], device=device)
    history = torch.zeros(len(z), HISTORY, *z.shape[1:], device=device)
    state = {"z": z, "stored": z, "history": history}
    state["index"] = torch.zeros(1, dtype=torch.int64, device=device)
    alignments = schedule.alignments()
    losses: list[StepLosses] = []
    for k, row in enumerate(table.rows()):
        engine = engines["step_grounded" if row.step < schedule.grounded_steps else "step_plain"]
        found = engine({**fixed, **state})
        state = {name: found[f"next_{name}"] for name in state}
        if alignments[k] == "computed":
            given = (found["loss_global"], found["loss_local"])
            losses.append(StepLosses(row.step, row.timestep, *given))
        if on_evaluation is not None:
            state["z"] = on_evaluation(k, state["z"])
    return state["z"], losses
