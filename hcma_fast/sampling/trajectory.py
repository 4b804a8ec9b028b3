"""One evaluation over tensors that stay where they are: what the captured sampler captures.

What changes from evaluation to evaluation lies in tables on the device, read at a counter on the
device. So an evaluation is always the same launches on the same addresses: it is captured once, and
replayed for all of a trajectory, without a write from the host. On a CPU the captured
function itself is called instead: the same code, whose rules are tested there, but for the update
of the latent where nothing is captured (:mod:`hcma_fast.sampling.update`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.engine import Engine, Stateful
from hcma_fast.errors import InputError
from hcma_fast.kernels.align_update import align_update_
from hcma_fast.sampling.exported import step_plan
from hcma_fast.sampling.loop import (
    CONTEXTS,
    Conditioning,
    Schedule,
    halves_by_image,
)
from hcma_fast.sampling.update import KernelUpdate, OperatorUpdate, Update
from hcma_fast.specs import HISTORY, PLAN_COLUMNS, PLAN_ROWS, GraphName


class Kind(NamedTuple):
    """What an evaluation launches: the same kind is the same launches."""

    aligns: bool
    """some image's gradient is computed"""
    keeps: bool
    """and kept, for steps that repeat it"""
    repeats: bool
    """some image follows an earlier gradient"""
    gated: bool
    """some image needs the UNet with gated attention"""
    guided: bool
    recomputes: bool = False
    """the contexts are computed again"""


class Buffers(ABC):
    """What every trajectory has: a latent, a counter, losses, and engines of its own.

    Args:
        z: (B, C, h, w) the latent between evaluations; captured: CUDA graphs will hold what the
            engines do.
    """

    def __init__(
        self, engines: Mapping[GraphName, Engine], z: Tensor, *, captured: bool = True
    ) -> None:
        self._fit_for_graphs = captured
        self._engines, self._forks = engines, dict[tuple[GraphName, bool], Engine]()
        self.batch = batch = len(z)
        self.z, device = z, z.device
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        # an entry per evaluation, then per image; the rows behind the last evaluation stay unused
        self.loss_global = torch.zeros(PLAN_ROWS, batch, device=device)
        self.loss_local = torch.zeros(PLAN_ROWS, batch, MAX_OBJECTS, device=device)
        self.lambdas = torch.zeros(batch, 2, device=device)
        self.captured: dict[tuple[Kind, ...], Callable[[], None]] = {}

    def launches(self, kind: Kind) -> Kind:
        """The kind that stands for all those with the same launches."""
        return kind

    @abstractmethod
    def evaluate(self, kind: Kind) -> None:
        """One evaluation, all of it on the device, in place."""

    def load(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> None:
        """Copy a batch into the buffers: the only writes from the host, before all evaluations.

        Args:
            schedules: one per image, or one for all.
        """
        self.z.copy_(z)
        self.lambdas.copy_(torch.tensor([schedule.lambdas for schedule in schedules]))
        self.step.zero_()

    def latent(self) -> Tensor:
        """A copy of the latent, in float32."""
        return self.z.clone() if self.z.dtype == torch.float32 else self.z.float()

    def check_capturable(self) -> None:
        """Ask the engines that ran, once they have run, whether a CUDA graph can hold what they do.

        Raises:
            BackendError: one of them says no.
        """
        for engine in self._forks.values():
            if isinstance(engine, Stateful):
                engine.check_capturable()

    def _keep_losses(self, found: Mapping[str, Tensor]) -> None:
        self.loss_global.index_copy_(0, self.step, found["loss_global"].unsqueeze(0))
        self.loss_local.index_copy_(0, self.step, found["loss_local"].unsqueeze(0))

    def _engine(self, name: GraphName, guided: bool) -> Engine:
        """An engine that is captured for one shape must not be set to another."""
        found = self._forks.get((name, guided))
        if found is None:
            engine = self._engines[name]
            found = engine.fork(self._fit_for_graphs) if isinstance(engine, Stateful) else engine
            self._forks[name, guided] = found
        return found


class Trajectory(Buffers):
    """An evaluation by the separate graphs: align, denoise, combine, step.

    Args:
        like: of B images, for the widths and dtypes of the conditioning; latent: (C, h, w); halves:
        2 with guidance, 1 without; narrow: what latent and history are kept in.
    """

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        like: Conditioning,
        latent: tuple[int, ...],
        halves: int,
        device: torch.device,
        narrow: torch.dtype = torch.float32,
        *,
        captured: bool = True,
    ) -> None:
        batch = len(like.caption_embedding)
        # without a capture and a GPU the op would only run its reference
        by_kernel = captured or device.type == "cuda"
        given = ((batch, *latent), narrow, device)
        self.update: Update = KernelUpdate(*given) if by_kernel else OperatorUpdate(*given)
        super().__init__(engines, self.update.z, captured=captured)
        # what the engines read; the latent itself where that is as wide
        self.wide = self.z if narrow == torch.float32 else self.z.float()
        self.gradient = torch.zeros(self.z.shape, device=device)
        # an entry per evaluation, then per image
        self.timesteps = torch.zeros(PLAN_ROWS, batch, dtype=torch.int64, device=device)
        self.etas = torch.zeros(PLAN_ROWS, batch, device=device)
        # the kernel's table: per image, then per evaluation
        self.repeats = torch.zeros(batch, PLAN_ROWS, device=device)
        # 1 for an image with gated attention, for each half of its guidance
        self.gates = torch.zeros(PLAN_ROWS, halves, batch, device=device)
        self.conditioning = Conditioning(
            **{name: torch.zeros_like(value) for name, value in vars(like).items()}
        )
        # what changes from evaluation to evaluation
        self.time = torch.zeros(1, batch, dtype=torch.int64, device=device)
        self.eta = torch.zeros(1, batch, device=device)
        self.gate = torch.zeros(1, halves, batch, device=device)
        self.moves = torch.zeros(1, batch, dtype=torch.bool, device=device)
        images = (batch, *[1] * len(latent))
        self._by_image = (self.eta.view(images), self.moves.view(images))
        self.change = torch.zeros(self.z.shape, device=device)
        self.doubled = torch.zeros(halves, *self.z.shape, device=device)
        self.times = torch.zeros(halves, batch, dtype=torch.int64, device=device)
        fixed = vars(self.conditioning)
        self.align_inputs = {
            **fixed,
            "z": self.wide,
            "eta": self.eta[0],
            "timestep": self.time[0],
            "lambdas": self.lambdas,
        }
        conditional = {n: fixed[n][-batch:] for n in ("text_context", "grounding_context")}
        doubled = {
            "sample": self.doubled.flatten(0, 1),
            "timestep": self.times.flatten(),
            "grounding_gate": self.gate.flatten(),
        }
        # both halves have the same gates, and the first one an aligned address
        single = {
            "sample": self.wide,
            "timestep": self.time[0],
            "grounding_gate": self.gate[0, 0],
        }
        self.unet_inputs = {True: fixed | doubled, False: fixed | conditional | single}
        # per half of the guidance, what its contexts are computed from, and where they go
        self.halves = [
            (inputs, {name: fixed[name][half * batch : (half + 1) * batch] for name in CONTEXTS})
            for half, inputs in enumerate(self.conditioning.halves())
        ]

    def launches(self, kind: Kind) -> Kind:
        """Without an unconditional half there is no guidance, whatever the schedule says."""
        return kind._replace(guided=kind.guided and len(self.halves) == 2)

    def evaluate(self, kind: Kind) -> None:
        """See :meth:`Buffers.evaluate`."""
        torch.index_select(self.timesteps, 0, self.step, out=self.time)
        if kind.aligns:
            self._align(kind.keeps)
        if kind.repeats:
            # at the rate of this step; the images that do not repeat have a rate of 0 there
            align_update_(self.z, self.gradient, self.repeats, self.step, False)
        if kind.guided:
            self.doubled.copy_(self.z)
            self.times.copy_(self.time)
        elif self.wide is not self.z:
            self.wide.copy_(self.z)
        if kind.recomputes:
            self._recompute(kind.guided)
        if kind.gated:
            torch.index_select(self.gates, 0, self.step, out=self.gate)
        unet = self._engine("unet_grounded" if kind.gated else "unet_plain", kind.guided)
        eps = unet(self.unet_inputs[kind.guided])["noise_pred"]
        unconditional, conditional = eps.chunk(2) if kind.guided else (None, eps)
        self.update(self.step, unconditional, conditional)
        self.step.add_(1)

    def _recompute(self, guided: bool) -> None:
        for inputs, contexts in self.halves if guided else self.halves[-1:]:
            found = self._engine("grounding", False)(inputs)
            # at once: the next call may write to the same memory
            for name, context in contexts.items():
                context.copy_(found[name])

    def _align(self, keeps: bool) -> None:
        torch.index_select(self.etas, 0, self.step, out=self.eta)
        if self.wide is not self.z:
            self.wide.copy_(self.z)
        aligned = self._engine("align", False)(self.align_inputs)
        # a rate of 0 leaves an image as it is, whatever the gradient
        torch.gt(self.eta, 0, out=self.moves)
        eta, moves = self._by_image
        if keeps:
            torch.sub(self.wide, aligned["z_aligned"], out=self.change)
            self.change.div_(eta)
            torch.where(moves, self.change, self.gradient, out=self.gradient)
        torch.where(moves, aligned["z_aligned"], self.wide, out=self.wide)
        if self.wide is not self.z:
            self.z.copy_(self.wide)
        self._keep_losses(aligned)

    def load(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> None:
        """See :meth:`Buffers.load`."""
        super().load(z, conditioning, schedules)
        # of a batch before: what is not finite there stays so at a rate of 0
        self.gradient.zero_()
        for name, buffer in vars(self.conditioning).items():
            buffer.copy_(getattr(conditioning, name))
        # behind an image's last evaluation its rate is 0, and its row of the table changes nothing
        timesteps = torch.zeros(len(schedules), PLAN_ROWS, dtype=torch.int64)
        etas, repeats, gates = torch.zeros(3, len(schedules), PLAN_ROWS)
        for row, schedule in enumerate(schedules):
            count = len(schedule.table)
            again = torch.tensor([what == "repeated" for what in schedule.alignments()])
            timesteps[row, :count] = schedule.table.timesteps
            etas[row, :count] = schedule.etas.where(~again, 0)
            repeats[row, :count] = schedule.etas.where(again, 0)
            gates[row, :count] = schedule.gates()
        self.timesteps.copy_(timesteps.T)
        self.etas.copy_(etas.T)
        self.repeats.copy_(repeats)
        self.gates.copy_(gates.T.unsqueeze(1))
        self.update.load(schedules)


class FusedTrajectory(Buffers):
    """An evaluation by a step graph: its state goes out of one call, and into the next.

    What comes out is copied into the buffers that go in, five latents' worth: a second captured
    evaluation, with the buffers swapped, would save that and double the graphs.

    Args:
        like: of B images with guidance, for the widths of the conditioning; latent: (C, h, w).
    """

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        like: Conditioning,
        latent: tuple[int, ...],
        device: torch.device,
        *,
        captured: bool = True,
    ) -> None:
        batch = len(like.caption_embedding)
        z = torch.zeros(batch, *latent, device=device)
        super().__init__(engines, z, captured=captured)
        self.stored = torch.zeros_like(self.z)
        self.history = torch.zeros(batch, HISTORY, *latent, device=device)
        self.plan = torch.zeros(PLAN_ROWS, PLAN_COLUMNS, device=device)
        self.guidance_scale = torch.zeros(1, device=device)
        self.conditioning = {
            name: torch.zeros(value.shape, dtype=value.dtype, device=device)
            for name, value in halves_by_image(like).items()
        }
        self.state = {
            "z": self.z,
            "stored": self.stored,
            "history": self.history,
            "index": self.step,
        }
        self.inputs = {
            **self.conditioning,
            **self.state,
            "plan": self.plan,
            "guidance_scale": self.guidance_scale,
            "lambdas": self.lambdas,
        }

    def launches(self, kind: Kind) -> Kind:
        """The step graphs align at every evaluation; where they do not, the rate is 0."""
        return Kind(aligns=True, keeps=False, repeats=False, gated=kind.gated, guided=True)

    def evaluate(self, kind: Kind) -> None:
        """See :meth:`Buffers.evaluate`."""
        found = self._engine("step_grounded" if kind.gated else "step_plain", True)(self.inputs)
        # before the index moves on
        self._keep_losses(found)
        for name, buffer in self.state.items():
            buffer.copy_(found[f"next_{name}"])

    def load(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> None:
        """See :meth:`Buffers.load`; the schedules differ in their lambdas alone."""
        super().load(z, conditioning, schedules)
        # the first evaluations weigh them with 0, which keeps a NaN of a batch before
        self.stored.zero_()
        self.history.zero_()
        for name, value in halves_by_image(conditioning).items():
            self.conditioning[name].copy_(value)
        self.plan.copy_(step_plan(schedules[0].table, schedules[0].etas))
        self.guidance_scale.fill_(schedules[0].guidance_scale)


def evaluation_kinds(schedules: Sequence[Schedule]) -> tuple[Kind, ...]:
    """What each evaluation of a batch has to do, until its longest schedule ends.

    Raises:
        InputError: in one evaluation some images need guidance, and others none.
    """
    kinds: list[Kind] = []
    plans = [(s, s.alignments(), s.grounded_unet_steps, s.guided_steps) for s in schedules]
    for k in range(max(len(s.table) for s in schedules)):
        # evaluation 1 is the corrector of step 0
        step = max(k - 1, 0)
        running = [plan for plan in plans if k < len(plan[1])]
        computed = [s for s, alignments, _, _ in running if alignments[k] == "computed"]
        guided = {step < end for _, _, _, end in running}
        if len(guided) > 1:
            raise InputError(
                "images of one batch must switch off the guidance at the same step",
                value=[(s.guidance_scale, s.savings.guidance_end) for s in schedules],
                remedy="Give them the same guidance_end and number of steps, or the share 1; and "
                "all of them a guidance_scale above 1, or none.",
            )
        kinds.append(
            Kind(
                aligns=bool(computed),
                keeps=any(s.savings.align_every > 1 for s in computed),
                repeats=any(alignments[k] == "repeated" for _, alignments, _, _ in running),
                gated=any(step < end for _, _, end, _ in running),
                guided=guided.pop(),
                recomputes=any(not s.savings.contexts_once for s, *_ in running),
            )
        )
    return tuple(kinds)
