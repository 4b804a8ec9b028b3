"""The sampler by replays: one CUDA graph per evaluation, or one for all of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from hcma_fast.engine import Engine
from hcma_fast.errors import InputError, UsageError
from hcma_fast.sampling.capture import (
    Capture,
    CaptureMode,
    CudaGraphs,
    capture_errors,
    memory_errors,
    no_capture,
)
from hcma_fast.sampling.loop import Conditioning, Schedule, StepLosses, fusable
from hcma_fast.sampling.trajectory import (
    Buffers,
    FusedTrajectory,
    Kind,
    Trajectory,
    evaluation_kinds,
)
from hcma_fast.specs import GraphName

_MOST_KINDS = 8
"""Captured evaluations of a shape, unless one call needs more: savings make up to 48 kinds."""


class ReplaySampler:
    """What :func:`runtime.sampler.sample` does, by replays; make one per pipeline.

    Where the engines hold step graphs that can run what is asked for, those are replayed, as
    :func:`runtime.sampler.sample_fused` would call them.

    Results are copies, so they belong to the caller. Threads take turns: the buffers are one
    batch's at a time. A new shape takes new buffers and graphs, and the least used go.

    Args:
        device: where engines and buffers are. On "cuda" evaluations are captured as CUDA graphs.
        mode: "step" replays once per evaluation; "trajectory" holds all evaluations in one graph,
            which leaves no place for a callback.
        max_shapes: shapes that are kept: batch size, latent size and dtype, with guidance or
            without, by step graphs or not; with "trajectory" also the graphs of each.
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
        self._shapes: OrderedDict[tuple[str | int, ...], Buffers] = OrderedDict()
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
            InputError: in one evaluation some images of the batch need guidance, and others none;
                or they keep their latents in different dtypes.
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
        with self._turn(), torch.no_grad():
            batch = self._buffers(z, conditioning, schedules)
            launches = tuple(batch.launches(kind) for kind in kinds)
            groups = [launches] if self.mode == "trajectory" else [(one,) for one in launches]
            replays = self._captured(batch, groups)
            batch.load(z, conditioning, schedules)
            for k, group in enumerate(groups):
                replays[group]()
                if on_evaluation is not None:
                    batch.z.copy_(on_evaluation(k, batch.latent()))
            count = len(kinds)
            result = batch.latent()
            loss_global = batch.loss_global[:count].clone().unbind()
            loss_local = batch.loss_local[:count].clone().unbind()
        rows = max((s.table for s in schedules), key=len).rows()
        losses = [
            StepLosses(row.step, row.timestep, *found)
            for row, kind, *found in zip(rows, kinds, loss_global, loss_local, strict=True)
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
    ) -> Buffers:
        """Those of this shape, the most recently used last."""
        halves = len(conditioning.text_context) // len(z)
        dtypes = sorted({schedule.savings.latent_dtype for schedule in schedules})
        if len(dtypes) > 1:
            raise InputError(
                "images of one batch must keep their latents in the same dtype",
                value=dtypes,
                remedy="Give them the same latent_dtype.",
            )
        fused = halves == 2 and fusable(self.engines, schedules)
        key = ("fused" if fused else dtypes[0], halves, *z.shape)
        found = self._shapes.get(key)
        if found is None:
            while len(self._shapes) >= self.max_shapes:
                self._drop()
            with memory_errors():
                given = (self.engines, conditioning, tuple(z.shape[1:]))
                captured = self._capture is not no_capture
                found = (
                    FusedTrajectory(*given, self.device, captured=captured)
                    if fused
                    else Trajectory(
                        *given, halves, self.device, getattr(torch, dtypes[0]), captured=captured
                    )
                )
        self._shapes[key] = found
        self._shapes.move_to_end(key)
        return found

    def _captured(
        self, batch: Buffers, groups: Sequence[tuple[Kind, ...]]
    ) -> dict[tuple[Kind, ...], Callable[[], None]]:
        """A replay for each distinct group of evaluations; of the others the least used go."""
        wanted = dict.fromkeys(groups)
        others = [group for group in batch.captured if group not in wanted]
        kept = self.max_shapes if self.mode == "trajectory" else _MOST_KINDS
        excess = len(others) + len(wanted) - max(kept, len(wanted))
        if excess > 0 and self._done is not None:
            self._done.synchronize()
        for group in others[: max(0, excess)]:
            del batch.captured[group]
        for group in wanted:
            replay = batch.captured.pop(group, None)
            if replay is None:
                # warm-ups advance the counter: it must not leave the tables
                batch.step.zero_()
                with memory_errors(), capture_errors():
                    replay = self._capture(
                        partial(_evaluate, batch, group), partial(_warm_up, batch, group)
                    )
            batch.captured[group] = replay
        return batch.captured


def _evaluate(batch: Buffers, group: Sequence[Kind]) -> None:
    for kind in group:
        batch.evaluate(kind)


def _warm_up(batch: Buffers, group: Sequence[Kind]) -> None:
    _evaluate(batch, sorted(set(group)))
    batch.check_capturable()
