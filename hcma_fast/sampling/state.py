"""A batch between evaluations, in tensors that stay where they are.

What changes from evaluation to evaluation is a row of each image's plan, read at the image's own
counter on the device. So an evaluation is always the same launches on the same addresses: a CUDA
graph captures it once and replays it for all of a trajectory, without a write from the host. Images
of a batch may stand at different evaluations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.engine import Engine, Stateful
from hcma_fast.kernels.align_update import align_update_, align_update_reference
from hcma_fast.kernels.denoise_update import denoise_update_
from hcma_fast.kernels.launch import triton
from hcma_fast.kernels.update_sums import Update, columns_of, denoise_update_rows, update_of
from hcma_fast.sampling.batch_kind import (
    Kind,
    check_deterministic,
    holds,
    shared_updates,
    used_columns,
)
from hcma_fast.sampling.conditioning import CONTEXTS, Conditioning
from hcma_fast.sampling.schedule import Networks, Schedule, StepLosses
from hcma_fast.sampling.step import SeparateStep
from hcma_fast.specs import HISTORY, PLAN_COLUMNS, PLAN_ROWS, Column, GraphName


class State(ABC):
    """Latent, stored latent, history, losses, and a counter and a plan per image.

    Args:
        like, z, schedules: a batch, for its shapes, dtypes and kind.
        captured: whether CUDA graphs will hold what the engines do. Engines that hold state are
            forked in any case.
    """

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        like: Conditioning,
        z: Tensor,
        schedules: Sequence[Schedule],
        *,
        captured: bool,
    ) -> None:
        self.kind = Kind.of(schedules)
        device, dtype, batch = z.device, self.kind.dtype, len(z)
        self._captured = captured
        self._engines, self._forks = engines, dict[tuple[GraphName, bool], Engine]()
        self.batch = batch
        self.z = torch.zeros(z.shape, dtype=dtype, device=device)
        self.stored = torch.zeros_like(self.z)
        self.history = torch.zeros(batch, HISTORY, *z.shape[1:], dtype=dtype, device=device)
        self.step = torch.zeros(batch, dtype=torch.int64, device=device)
        self.plan = torch.zeros(batch, PLAN_ROWS, PLAN_COLUMNS, device=device)
        self.lambdas = torch.zeros(batch, 2, device=device)
        # an entry per image and evaluation; those behind the last evaluation stay unused
        self.loss_global = torch.zeros(batch, PLAN_ROWS, device=device)
        self.loss_local = torch.zeros(batch, PLAN_ROWS, MAX_OBJECTS, device=device)
        self._losses = (self.loss_global.view(-1), self.loss_local.view(-1, MAX_OBJECTS))
        # where each image is in its plan, all plans being one table
        self._first = torch.arange(batch, device=device) * PLAN_ROWS
        self._at = torch.zeros_like(self.step)
        self.captured: dict[tuple[Networks, ...], Callable[[], None]] = {}

    def launches(self, networks: Networks) -> Networks:
        """What stands for all those with the same launches."""
        return networks

    @abstractmethod
    def advance(self, networks: Networks) -> None:
        """One evaluation, all of it on the device, in place."""

    def load(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> None:
        """Copy a batch into the state: the only writes from the host, before all evaluations.

        Args:
            schedules: one per image, or one for all.

        Raises:
            UsageError: a solver that adds noise.
        """
        check_deterministic(schedules)
        self.z.copy_(z)
        # of a batch before: what is not finite there stays so at a weight of 0
        self.stored.zero_()
        self.history.zero_()
        self.lambdas.copy_(torch.tensor([schedule.lambdas for schedule in schedules]))
        self.plan.copy_(torch.stack([schedule.plan for schedule in schedules]))
        self.step.zero_()

    def latent(self) -> Tensor:
        """A copy of the latent, in float32."""
        return self.z.clone() if self.z.dtype == torch.float32 else self.z.float()

    def losses(
        self, schedules: Sequence[Schedule], networks: Sequence[Networks]
    ) -> list[StepLosses]:
        """Of the evaluations that ran the alignment, listed as the longest schedule has them."""
        count = len(networks)
        found = [
            kept[:, :count].transpose(0, 1).clone(memory_format=torch.contiguous_format).unbind()
            for kept in (self.loss_global, self.loss_local)
        ]
        rows = max((s.table for s in schedules), key=len).evaluations
        return [
            StepLosses(row.step, row.timestep, *losses)
            for row, needed, *losses in zip(rows, networks, *found, strict=True)
            if needed.aligned
        ]

    def check_capturable(self) -> None:
        """Ask the engines that ran, once they have run, whether a CUDA graph can hold what they do.

        Raises:
            BackendError: one of them says no.
        """
        for engine in self._forks.values():
            if isinstance(engine, Stateful):
                engine.check_capturable()

    def _find_rows(self) -> None:
        torch.add(self._first, self.step, out=self._at)

    def _keep_losses(self, found: Mapping[str, Tensor]) -> None:
        for kept, name in zip(self._losses, ("loss_global", "loss_local"), strict=True):
            kept.index_copy_(0, self._at, found[name])

    def _fork(self, name: GraphName, guided: bool) -> Engine:
        """An engine that is captured for one shape must not be set to another."""
        found = self._forks.get((name, guided))
        if found is None:
            engine = self._engines[name]
            found = engine.fork(self._captured) if isinstance(engine, Stateful) else engine
            self._forks[name, guided] = found
        return found


class SeparateGraphs(SeparateStep, State):
    """An evaluation by the graphs `align`, `unet_grounded` and `unet_plain`."""

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        like: Conditioning,
        z: Tensor,
        schedules: Sequence[Schedule],
        *,
        captured: bool,
    ) -> None:
        super().__init__(engines, like, z, schedules, captured=captured)
        device, batch = z.device, self.batch
        halves = len(like.text_context) // batch
        # without a capture and a GPU the op would only run its reference
        self._by_kernel = captured or (device.type == "cuda" and triton is not None)
        # without a capture the host knows the evaluation, and what its update can leave out
        self._updates, self._evaluation = list[Update](), 0
        self._known = dict[tuple[tuple[bool, ...], bool], Update]()
        # what the engines read; the latent itself where that is as wide
        self.wide = self.z if self.z.dtype == torch.float32 else self.z.float()
        self.gradient = torch.zeros(self.z.shape, device=device)
        self.rates = torch.zeros(batch, PLAN_ROWS if self.kind.repeats else 0, device=device)
        self.move = torch.zeros(self.z.shape, device=device) if self.kind.moves else None
        self.conditioning = Conditioning(
            **{name: torch.zeros_like(value) for name, value in like.tensors().items()}
        )
        # this evaluation's row of each plan, and what the engines take of it
        self.row = torch.zeros(batch, PLAN_COLUMNS, device=device)
        self._columns = columns_of(self.row, z.dim())
        self._slots = self.history.unbind(1)
        self._plans = self.plan.view(-1, PLAN_COLUMNS)
        self._row_time = self.row[:, Column.TIMESTEP]
        self._row_eta = self.row[:, Column.ETA]
        self._row_gate = self.row[:, Column.GATE]
        self.eta = torch.zeros(batch, device=device)
        self.aligns = torch.zeros(batch, dtype=torch.bool, device=device)
        images = (batch, *[1] * (z.dim() - 1))
        self._by_image = (self.eta.view(images), self.aligns.view(images))
        self.change = torch.zeros(self.z.shape, device=device)
        # for each half of the guidance
        self.doubled = torch.zeros(halves, *self.z.shape, device=device)
        self.times = torch.zeros(halves, batch, dtype=torch.int64, device=device)
        self.time = self.times[0]
        self.gate = torch.zeros(halves, batch, device=device)
        fixed = self.conditioning.tensors()
        self.align_inputs = {
            **fixed,
            "z": self.wide,
            "eta": self.eta,
            "timestep": self.time,
            "lambdas": self.lambdas,
        }
        conditional = {name: fixed[name][-batch:] for name in CONTEXTS}
        doubled = {
            "sample": self.doubled.flatten(0, 1),
            "timestep": self.times.flatten(),
            "grounding_gate": self.gate.flatten(),
        }
        # both halves have the same gates, and the first one an aligned address
        single = {
            "sample": self.wide,
            "timestep": self.time,
            "grounding_gate": self.gate[0],
        }
        self.unet_inputs = {True: fixed | doubled, False: fixed | conditional | single}
        # per half of the guidance, what its contexts are computed from, and where they go
        self.halves = [
            (inputs, {name: fixed[name][half * batch : (half + 1) * batch] for name in CONTEXTS})
            for half, inputs in enumerate(self.conditioning.halves())
        ]

    def launches(self, networks: Networks) -> Networks:
        """Without an unconditional half there is no guidance, whatever the schedule says."""
        return networks._replace(guided=networks.guided and len(self.halves) == 2)

    def _align(self, computed: bool) -> None:
        self._find_rows()
        torch.index_select(self._plans, 0, self._at, out=self.row)
        self.times.copy_(self._row_time)
        if self.move is not None:
            self.move.copy_(self.z)
        if computed:
            self._compute_alignment()
        if self.kind.repeats:
            self._repeat()
        if self.move is not None:
            torch.sub(self.z, self.move, out=self.move)

    def _compute_alignment(self) -> None:
        self.eta.copy_(self._row_eta)
        if self.wide is not self.z:
            self.wide.copy_(self.z)
        aligned = self._fork("align", False)(self.align_inputs)
        # a rate of 0 leaves an image as it is, whatever the gradient
        torch.gt(self.eta, 0, out=self.aligns)
        eta, aligns = self._by_image
        if self.kind.repeats:
            torch.sub(self.wide, aligned["z_aligned"], out=self.change)
            self.change.div_(eta)
            torch.where(aligns, self.change, self.gradient, out=self.gradient)
        torch.where(aligns, aligned["z_aligned"], self.wide, out=self.wide)
        if self.wide is not self.z:
            self.z.copy_(self.wide)
        self._keep_losses(aligned)

    def _repeat(self) -> None:
        """Follow the kept gradients; images that do not repeat have a rate of 0 here."""
        given = (self.z, self.gradient, self.rates, self.step, False)
        if self._by_kernel:
            align_update_(*given)
        else:
            self.z.copy_(align_update_reference(*given))

    def _recompute(self, guided: bool) -> None:
        for inputs, contexts in self.halves if guided else self.halves[-1:]:
            found = self._fork("grounding", False)(inputs)
            # at once: the next call may write to the same memory
            for name, context in contexts.items():
                context.copy_(found[name])

    def _engine(self, name: GraphName, guided: bool) -> Engine:
        return self._fork(name, guided)

    def _unet_inputs(self, networks: Networks) -> Mapping[str, Tensor]:
        if networks.guided:
            self.doubled.copy_(self.z)
        elif self.wide is not self.z:
            self.wide.copy_(self.z)
        if self.kind.recomputes:
            self._recompute(networks.guided)
        if networks.grounded:
            self.gate.copy_(self._row_gate)
        return self.unet_inputs[networks.guided]

    def _combine(self, unconditional: Tensor | None, conditional: Tensor) -> None:
        self._update(unconditional, conditional)
        self.step.add_(1)

    def _update(self, unconditional: Tensor | None, conditional: Tensor) -> None:
        z, stored, history, eps = self.z, self.stored, self.history, (unconditional, conditional)
        if self._by_kernel:
            denoise_update_(z, stored, history, *eps, self.move, None, self.plan, self.step)
            return
        update = self._updates[self._evaluation]
        self._evaluation += 1
        moved, held, recent = denoise_update_rows(
            z, stored, self._slots, *eps, self.move, None, update
        )
        if update.held:
            # before the latent, which it may be
            self.stored.copy_(held)
        if recent is not self._slots:
            # the oldest first: each moves on by one
            for slot, prediction in zip(self._slots[::-1], recent[::-1], strict=True):
                slot.copy_(prediction)
        self.z.copy_(moved)

    def _updates_of(self, schedules: Sequence[Schedule]) -> list[Update]:
        first = schedules[0]
        if all(
            s.table is first.table and s.guidance_scale == first.guidance_scale for s in schedules
        ):
            return shared_updates(first)
        used = used_columns(schedules)
        for key in zip(used, holds(used), strict=True):
            if key not in self._known:
                self._known[key] = update_of(self._columns, key[0], holds=key[1])
        return [self._known[key] for key in zip(used, holds(used), strict=True)]

    def load(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> None:
        """See :meth:`State.load`."""
        super().load(z, conditioning, schedules)
        self._evaluation = 0
        if not self._by_kernel:
            self._updates = self._updates_of(schedules)
        self.gradient.zero_()
        if self.kind.repeats:
            self.rates.copy_(self.plan[:, :, Column.REPEAT])
        given = conditioning.tensors()
        for name, buffer in self.conditioning.tensors().items():
            buffer.copy_(given[name])


class StepGraphs(State):
    """An evaluation by a step graph: its state goes out of one call, and into the next.

    What comes out is copied into the tensors that go in, five latents' worth: a second captured
    evaluation, with the buffers swapped, would save that and double the graphs.
    """

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        like: Conditioning,
        z: Tensor,
        schedules: Sequence[Schedule],
        *,
        captured: bool,
    ) -> None:
        super().__init__(engines, like, z, schedules, captured=captured)
        self.conditioning = {
            name: torch.zeros(value.shape, dtype=value.dtype, device=z.device)
            for name, value in like.by_image().items()
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
            "lambdas": self.lambdas,
        }

    def launches(self, networks: Networks) -> Networks:
        """The step graphs align at every evaluation; where they do not, the rate is 0."""
        return Networks(aligned=True, grounded=networks.grounded, guided=True)

    def advance(self, networks: Networks) -> None:
        """See :meth:`State.advance`."""
        self._find_rows()
        name: GraphName = "step_grounded" if networks.grounded else "step_plain"
        found = self._fork(name, True)(self.inputs)
        self._keep_losses(found)
        for state, buffer in self.state.items():
            buffer.copy_(found[f"next_{state}"])

    def load(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> None:
        """See :meth:`State.load`."""
        super().load(z, conditioning, schedules)
        for name, value in conditioning.by_image().items():
            self.conditioning[name].copy_(value)
