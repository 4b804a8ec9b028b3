"""The sampler over tensors that stay where they are: one CUDA graph replay per evaluation.

What changes from evaluation to evaluation lies in tables on the device, read at a counter on the
device. So an evaluation is always the same launches on the same addresses: it is captured once, and
replayed for all of a trajectory, without a write from the host. On a CPU the captured
function itself is called instead: the same code, whose rules are tested there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.errors import InputError, UsageError
from hcma_fast.kernels.align_update import align_update_
from hcma_fast.kernels.denoise_update import COLUMNS, RING, denoise_table, denoise_update_
from hcma_fast.runtime.capture import (
    Capture,
    CaptureMode,
    CudaGraphs,
    capture_errors,
    memory_errors,
    no_capture,
)
from hcma_fast.runtime.engine import Engine
from hcma_fast.runtime.sampler import Conditioning, Schedule, StepLosses
from hcma_fast.specs import PLAN_ROWS, GraphName


class Kind(NamedTuple):
    """What an evaluation launches: the same kind is the same launches."""

    aligns: bool
    """some image's gradient is computed"""
    keeps: bool
    """and kept, for steps that repeat it"""
    repeats: bool
    """some image follows an earlier gradient"""
    gated: bool
    guided: bool


@runtime_checkable
class Forkable(Protocol):
    """An engine that holds state for the shape it runs, as TensorRT's context does."""

    def fork(self) -> Engine:
        """The same engine with state of its own."""
        ...


class Trajectory:
    """Buffers of one shape, the evaluation that works on them, and what was captured of it.

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
    ) -> None:
        self._engines, self._forks = engines, dict[tuple[GraphName, bool], Engine]()
        self.halves = halves
        batch = len(like.caption_embedding)
        self.batch = batch
        self.z = torch.zeros(batch, *latent, dtype=narrow, device=device)
        self.stored = torch.zeros_like(self.z)
        self.history = torch.zeros(RING, *self.z.shape, dtype=narrow, device=device)
        # what the engines read; the latent itself where that is as wide
        self.wide = self.z if narrow == torch.float32 else self.z.float()
        self.gradient = torch.zeros(self.z.shape, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        # an entry per evaluation, then per image; the rows behind the last evaluation stay unused
        self.timesteps = torch.zeros(PLAN_ROWS, batch, dtype=torch.int64, device=device)
        self.etas = torch.zeros(PLAN_ROWS, batch, device=device)
        self.loss_global = torch.zeros(PLAN_ROWS, batch, device=device)
        self.loss_local = torch.zeros(PLAN_ROWS, batch, MAX_OBJECTS, device=device)
        # the kernels' tables: per image, then per evaluation
        self.table = torch.zeros(batch, PLAN_ROWS, COLUMNS, device=device)
        self.repeats = torch.zeros(batch, PLAN_ROWS, device=device)
        self.lambdas = torch.zeros(batch, 2, device=device)
        self.conditioning = Conditioning(
            **{name: torch.zeros_like(value) for name, value in vars(like).items()}
        )
        # what changes from evaluation to evaluation
        self.time = torch.zeros(1, batch, dtype=torch.int64, device=device)
        self.eta = torch.zeros(1, batch, device=device)
        self.moves = torch.zeros(1, batch, dtype=torch.bool, device=device)
        self.change = torch.zeros(self.z.shape, device=device)
        self.doubled = torch.zeros(halves, *self.z.shape, device=device)
        self.times = torch.zeros(halves, batch, dtype=torch.int64, device=device)
        self.captured: dict[tuple[Kind, ...], Callable[[], None]] = {}
        fixed = vars(self.conditioning)
        self.align_inputs = {
            **fixed,
            "z": self.wide,
            "eta": self.eta[0],
            "timestep": self.time[0],
            "lambdas": self.lambdas,
        }
        conditional = {n: fixed[n][-batch:] for n in ("text_context", "grounding_context")}
        doubled = {"sample": self.doubled.flatten(0, 1), "timestep": self.times.flatten()}
        single = {"sample": self.wide, "timestep": self.time[0]}
        self.unet_inputs = {True: fixed | doubled, False: fixed | conditional | single}

    def evaluate(self, kind: Kind) -> None:
        """One evaluation: align, denoise, combine, step. All of it on the device, in place."""
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
        unet = self._engine("unet_grounded" if kind.gated else "unet_plain", kind.guided)
        eps = unet(self.unet_inputs[kind.guided])["noise_pred"]
        unconditional = eps[: self.batch] if kind.guided else None
        conditional = eps[-self.batch :]
        denoise_update_(
            self.z, self.history, self.stored, unconditional, conditional, self.table, self.step
        )
        self.step.add_(1)

    def _align(self, keeps: bool) -> None:
        torch.index_select(self.etas, 0, self.step, out=self.eta)
        if self.wide is not self.z:
            self.wide.copy_(self.z)
        aligned = self._engine("align", False)(self.align_inputs)
        # a rate of 0 leaves an image as it is, whatever the gradient
        torch.gt(self.eta, 0, out=self.moves)
        images = (-1, *[1] * (self.z.dim() - 1))
        moves = self.moves.view(images)
        if keeps:
            torch.sub(self.wide, aligned["z_aligned"], out=self.change)
            self.change.div_(self.eta.view(images))
            torch.where(moves, self.change, self.gradient, out=self.gradient)
        torch.where(moves, aligned["z_aligned"], self.wide, out=self.wide)
        if self.wide is not self.z:
            self.z.copy_(self.wide)
        self.loss_global.index_copy_(0, self.step, aligned["loss_global"].unsqueeze(0))
        self.loss_local.index_copy_(0, self.step, aligned["loss_local"].unsqueeze(0))

    def _engine(self, name: GraphName, guided: bool) -> Engine:
        """An engine that is captured for one shape must not be set to another."""
        found = self._forks.get((name, guided))
        if found is None:
            engine = self._engines[name]
            found = engine.fork() if isinstance(engine, Forkable) else engine
            self._forks[name, guided] = found
        return found

    def latent(self) -> Tensor:
        """A copy of the latent, in float32."""
        return self.z.clone() if self.wide is self.z else self.z.float()

    def load(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> None:
        """Copy a batch into the buffers: the only writes from the host, before all evaluations.

        Args:
            schedules: one per image, or one for all.
        """
        self.z.copy_(z)
        # of a batch before: what is not finite there stays so at a rate of 0
        self.gradient.zero_()
        for name, buffer in vars(self.conditioning).items():
            buffer.copy_(getattr(conditioning, name))
        self.lambdas.copy_(torch.tensor([schedule.lambdas for schedule in schedules]))
        # behind an image's last evaluation its rate is 0, and its row of the table changes nothing
        timesteps = torch.zeros(len(schedules), PLAN_ROWS, dtype=torch.int64)
        etas, repeats = torch.zeros(2, len(schedules), PLAN_ROWS)
        for row, schedule in enumerate(schedules):
            count = len(schedule.table)
            again = torch.tensor([what == "repeated" for what in schedule.alignments()])
            timesteps[row, :count] = schedule.table.timesteps
            etas[row, :count] = schedule.etas.where(~again, 0)
            repeats[row, :count] = schedule.etas.where(again, 0)
        self.timesteps.copy_(timesteps.T)
        self.etas.copy_(etas.T)
        self.repeats.copy_(repeats)
        tables = [denoise_table(s.table, s.guidance_scale, PLAN_ROWS) for s in schedules]
        self.table.copy_(torch.cat(tables))
        self.step.zero_()


class ReplaySampler:
    """What :func:`runtime.sampler.sample` does, by replays; make one per pipeline.

    Results are copies, so they belong to the caller. Threads take turns: the buffers are one
    batch's at a time. A new shape takes new buffers and graphs, and the least used go.

    Args:
        device: where engines and buffers are. On "cuda" evaluations are captured as CUDA graphs.
        mode: "step" replays once per evaluation; "trajectory" holds all evaluations in one graph,
            which leaves no place for a callback.
        max_shapes: shapes that are kept: batch size, latent size and dtype, with guidance or
            without.
        capture: for another way than the device's own.
    """

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        device: str,
        *,
        mode: CaptureMode = "step",
        max_shapes: int = 4,
        capture: Capture | None = None,
    ) -> None:
        self.engines, self.mode, self.max_shapes = engines, mode, max_shapes
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._capture = capture or (CudaGraphs(self.device) if on_gpu else no_capture)
        self._shapes: OrderedDict[tuple[str | int, ...], Trajectory] = OrderedDict()
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._done = torch.cuda.Event() if on_gpu else None

    def __call__(
        self,
        z: Tensor,
        conditioning: Conditioning,
        schedule: Schedule | Sequence[Schedule],
        on_evaluation: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, list[StepLosses]]:
        """See :func:`runtime.sampler.sample`.

        Args:
            schedule: one for all, or one per image. Images of fewer steps wait for the others, and
                losses are listed as the longest has them.

        Raises:
            InputError: images of one batch need different UNets in the same evaluation, or keep
                their latents in different dtypes.
            UsageError: a callback with ``mode="trajectory"``, or one that calls this sampler.
            BackendError: the device cannot capture what the engines do.
            DeviceMemoryError: it has no memory left.
        """
        schedules = [schedule] if isinstance(schedule, Schedule) else list(schedule)
        if on_evaluation is not None and self.mode == "trajectory":
            raise UsageError(
                "a graph of the whole trajectory cannot call back",
                value=self.mode,
                remedy='Call enable_cuda_graphs("step"), or leave out the callback.',
            )
        if self._owner == threading.get_ident():
            raise UsageError(
                "a callback cannot generate with the pipeline that called it",
                remedy="Load a second pipeline, or generate after the call.",
            )
        kinds = evaluation_kinds(schedules)
        groups = [kinds] if self.mode == "trajectory" else [(kind,) for kind in kinds]
        with self._turn(), torch.no_grad():
            batch = self._buffers(z, conditioning, schedules)
            replays = self._captured(batch, groups)
            batch.load(z, conditioning, schedules)
            for k, group in enumerate(groups):
                replays[group]()
                if on_evaluation is not None:
                    batch.z.copy_(on_evaluation(k, batch.latent()))
            count = len(kinds)
            result = batch.latent()
            loss_global = batch.loss_global[:count].clone()
            loss_local = batch.loss_local[:count].clone()
        rows = max((s.table for s in schedules), key=len).rows()
        losses = [
            StepLosses(row.step, row.timestep, loss_global[k], loss_local[k])
            for k, (row, kind) in enumerate(zip(rows, kinds, strict=True))
            if kind.aligns
        ]
        return result, losses

    def clear(self) -> None:
        """Give all buffers and graphs back; what comes next captures anew."""
        with self._turn():
            while self._shapes:
                self._drop()
            if isinstance(self._capture, CudaGraphs):
                self._capture = CudaGraphs(self.device)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The buffers are one call's: of one thread, and on a GPU of one stream."""
        on_gpu = self._done is not None
        with self._lock, torch.cuda.device(self.device) if on_gpu else nullcontext():
            self._owner = threading.get_ident()
            try:
                if self._done is not None:
                    # the last batch may have been on another stream
                    self._done.wait()
                yield
            finally:
                if self._done is not None:
                    self._done.record()
                self._owner = None

    def _drop(self) -> None:
        """The shape that was not used for longest."""
        if self._done is not None:
            self._done.synchronize()
        _, gone = self._shapes.popitem(last=False)
        gone.captured.clear()

    def _buffers(
        self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]
    ) -> Trajectory:
        """Those of this shape, the most recently used last."""
        halves = len(conditioning.text_context) // len(z)
        dtypes = sorted({schedule.savings.latent_dtype for schedule in schedules})
        if len(dtypes) > 1:
            raise InputError(
                "images of one batch must keep their latents in the same dtype",
                value=dtypes,
                remedy="Give them the same latent_dtype.",
            )
        key = (dtypes[0], halves, *z.shape)
        found = self._shapes.get(key)
        if found is None:
            while len(self._shapes) >= self.max_shapes:
                self._drop()
            with memory_errors():
                found = Trajectory(
                    self.engines,
                    conditioning,
                    z.shape[1:],
                    halves,
                    self.device,
                    getattr(torch, dtypes[0]),
                )
        self._shapes[key] = found
        self._shapes.move_to_end(key)
        return found

    def _captured(
        self, batch: Trajectory, groups: Sequence[tuple[Kind, ...]]
    ) -> dict[tuple[Kind, ...], Callable[[], None]]:
        """A replay for each distinct group of evaluations."""

        def run(group: Sequence[Kind]) -> None:
            for kind in group:
                batch.evaluate(kind)

        for group in dict.fromkeys(groups):
            replay = batch.captured.pop(group, None)
            if replay is None:
                if self.mode == "trajectory" and len(batch.captured) >= self.max_shapes:
                    batch.captured.pop(next(iter(batch.captured)))
                # warm-ups advance the counter: it must not leave the tables
                batch.step.zero_()
                with memory_errors(), capture_errors():
                    replay = self._capture(partial(run, group), partial(run, sorted(set(group))))
            batch.captured[group] = replay
        return batch.captured


def evaluation_kinds(schedules: Sequence[Schedule]) -> tuple[Kind, ...]:
    """What each evaluation of a batch has to do, until its longest schedule ends.

    Raises:
        InputError: in one evaluation some images need gated attention, and others none; or some
            guidance, and others none.
    """
    kinds: list[Kind] = []
    plans = [(s, s.alignments(), s.grounded_steps, s.guided_steps) for s in schedules]
    for k in range(max(len(s.table) for s in schedules)):
        # evaluation 1 is the corrector of step 0
        step = max(k - 1, 0)
        running = [plan for plan in plans if k < len(plan[1])]
        computed = [s for s, alignments, _, _ in running if alignments[k] == "computed"]
        gated = {step < end for _, _, end, _ in running}
        guided = {step < end for _, _, _, end in running}
        if len(gated) > 1 or len(guided) > 1:
            raise InputError(
                "images of one batch must switch off the gated attention at the same step, and "
                "the guidance too",
                value=[
                    (s.grounding_beta, s.guidance_scale, s.savings.guidance_end) for s in schedules
                ],
                remedy="Give them the same grounding_beta, guidance_end and number of steps, or 1 "
                "for both shares; and all of them a guidance_scale above 1, or none.",
            )
        kinds.append(
            Kind(
                aligns=bool(computed),
                keeps=any(s.savings.align_every > 1 for s in computed),
                repeats=any(alignments[k] == "repeated" for _, alignments, _, _ in running),
                gated=gated.pop(),
                guided=guided.pop(),
            )
        )
    return tuple(kinds)
