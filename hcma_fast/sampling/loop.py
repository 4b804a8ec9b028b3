"""The sampler: all evaluations of a batch (paper Algorithm 1, lines 15 to 23)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hcma_fast.engine import Engine
from hcma_fast.kernels.update_sums import denoise_update_rows
from hcma_fast.sampling.batch_kind import Kind, check_deterministic, shared_updates
from hcma_fast.sampling.conditioning import CONTEXTS, Conditioning, ground
from hcma_fast.sampling.schedule import Networks, Schedule, StepLosses, fusable
from hcma_fast.sampling.step import SeparateStep
from hcma_fast.specs import HISTORY, GraphName


class Trajectory(ABC):
    """A batch of which all images stand at the same evaluation of one schedule.

    The host knows that evaluation, so its numbers are the host's, and nothing is copied: latents
    are those that the engines return. :class:`sampling.state.State` does the same in tensors that
    stay where they are.
    """

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        z: Tensor,
        conditioning: Conditioning,
        schedule: Schedule,
    ) -> None:
        check_deterministic([schedule])
        self.z, self.engines, self.schedule = z, engines, schedule
        self.lambdas = torch.tensor([schedule.lambdas] * len(z), device=z.device)
        self.found: list[Mapping[str, Tensor]] = []

    @abstractmethod
    def advance(self, networks: Networks) -> None:
        """One evaluation: align, denoise, combine, step."""

    def latent(self) -> Tensor:
        """The latent, in float32."""
        return self.z if self.z.dtype == torch.float32 else self.z.float()

    def losses(self) -> list[StepLosses]:
        """Of the evaluations that ran the alignment."""
        rows = zip(self.schedule.table.evaluations, self.schedule.networks, strict=True)
        aligned = [row for row, needed in rows if needed.aligned]
        return [
            StepLosses(row.step, row.timestep, found["loss_global"], found["loss_local"])
            for row, found in zip(aligned, self.found, strict=True)
        ]


class SeparateTrajectory(SeparateStep, Trajectory):
    """By the graphs `align`, `unet_grounded` and `unet_plain`."""

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        z: Tensor,
        conditioning: Conditioning,
        schedule: Schedule,
    ) -> None:
        super().__init__(engines, z, conditioning, schedule)
        batch, device = len(z), z.device
        kind = Kind.of([schedule])
        self.kind, self.conditioning, self.evaluation = kind, conditioning, 0
        self.narrow = kind.dtype != z.dtype
        self.z = z.to(kind.dtype)
        self.stored = self.gradient = self.wide = self.z
        self.move: Tensor | None = None
        self.history: Sequence[Tensor] = [torch.zeros_like(self.z)] * HISTORY
        self.updates = shared_updates(schedule)
        self.alignments, self.rates = schedule.alignments(), schedule.etas.tolist()
        both = {**conditioning.tensors(), "lambdas": self.lambdas}
        conditional = both | {name: both[name][-batch:] for name in CONTEXTS}
        self.fixed = {True: both, False: conditional}
        self.halves = len(conditioning.text_context) // batch
        self.etas = _by_evaluation(schedule.etas.float(), batch, device)
        times, gates = schedule.table.timesteps, schedule.gates()
        self.times = {}
        self.gates = {}
        for guided, size in ((False, batch), (True, self.halves * batch)):
            self.times[guided] = _by_evaluation(times, size, device)
            self.gates[guided] = _by_evaluation(gates, size, device)

    def _align(self, computed: bool) -> None:
        k, z = self.evaluation, self.z.float() if self.narrow else self.z
        before, rate = z, self.rates[k]
        if computed:
            at = {"z": z, "eta": self.etas[k], "timestep": self.times[False][k]}
            found = self.engines["align"]({**self.fixed[True], **at})
            self.found.append(found)
            if rate:
                aligned = found["z_aligned"]
                if self.kind.repeats:
                    self.gradient = (z - aligned) / rate
                z = aligned
        elif rate:
            z = torch.add(z, self.gradient, alpha=-rate)
        if self.narrow:
            z = z.to(self.kind.dtype).float()
        if self.kind.moves:
            self.move = z - before
        self.wide = z

    def _engine(self, name: GraphName, guided: bool) -> Engine:
        return self.engines[name]

    def _unet_inputs(self, networks: Networks) -> Mapping[str, Tensor]:
        k, guided = self.evaluation, networks.guided
        fixed = self.fixed[guided]
        if self.kind.recomputes:
            fixed = fixed | ground(self.engines, self.conditioning.halves()[0 if guided else -1 :])
        at = {
            "sample": torch.cat([self.wide, self.wide]) if guided else self.wide,
            "timestep": self.times[guided][k],
            "grounding_gate": self.gates[guided][k],
        }
        return {**fixed, **at}

    def _combine(self, unconditional: Tensor | None, conditional: Tensor) -> None:
        latent = self.wide.to(self.kind.dtype) if self.narrow else self.wide
        self.z, self.stored, self.history = denoise_update_rows(
            latent,
            self.stored,
            self.history,
            unconditional,
            conditional,
            self.move,
            None,
            self.updates[self.evaluation],
        )
        self.evaluation += 1


class FusedTrajectory(Trajectory):
    """By the step graphs, one call per evaluation: the state goes in, and comes out as it is."""

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        z: Tensor,
        conditioning: Conditioning,
        schedule: Schedule,
    ) -> None:
        super().__init__(engines, z, conditioning, schedule)
        batch, device = len(z), z.device
        plan = schedule.plan.float().expand(batch, -1, -1)
        self.fixed = {name: value.contiguous() for name, value in conditioning.by_image().items()}
        self.fixed |= {"plan": plan.contiguous().to(device), "lambdas": self.lambdas}
        self.stored = z
        self.history = torch.zeros(batch, HISTORY, *z.shape[1:], device=device)
        self.index = torch.zeros(batch, dtype=torch.int64, device=device)

    def advance(self, networks: Networks) -> None:
        """See :meth:`Trajectory.advance`."""
        engine = self.engines["step_grounded" if networks.grounded else "step_plain"]
        state = {
            "z": self.z,
            "stored": self.stored,
            "history": self.history,
            "index": self.index,
        }
        found = engine({**self.fixed, **state})
        self.z, self.stored = found["next_z"], found["next_stored"]
        self.history, self.index = found["next_history"], found["next_index"]
        if networks.aligned:
            self.found.append(found)


def _by_evaluation(values: Tensor, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """(size,) for each of ``values`` (K,)."""
    return values.to(device).unsqueeze(1).expand(-1, size).contiguous().unbind()


def sample(
    engines: Mapping[GraphName, Engine],
    z: Tensor,
    conditioning: Conditioning,
    schedule: Schedule,
    on_evaluation: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[StepLosses]]:
    """Run all evaluations from noise ``z`` (B, 4, h, w) to the clean, scaled latent.

    By the step graphs where there are any that can run this schedule, else by the separate ones.
    ``on_evaluation`` gets the evaluation's number and the new latent, and returns the latent to
    go on with.
    """
    guided = len(conditioning.text_context) == 2 * len(z)
    fused = guided and fusable(engines, [schedule])
    make = FusedTrajectory if fused else SeparateTrajectory
    with torch.no_grad():
        trajectory = make(engines, z, conditioning, schedule)
        for k, networks in enumerate(schedule.networks):
            # without an unconditional half there is no guidance, whatever the schedule says
            trajectory.advance(networks if guided else networks._replace(guided=False))
            if on_evaluation is not None:
                changed = on_evaluation(k, trajectory.latent())
                trajectory.z = changed.to(trajectory.z.dtype)
        return trajectory.latent(), trajectory.losses()
