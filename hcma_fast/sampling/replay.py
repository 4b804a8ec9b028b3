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
from hcma_fast.errors import UsageError
from hcma_fast.sampling.batch_kind import Kind
from hcma_fast.sampling.capture import (
    Capture,
    CaptureMode,
    CudaGraphs,
    capture_errors,
    memory_errors,
    no_capture,
)
from hcma_fast.sampling.conditioning import Conditioning
from hcma_fast.sampling.schedule import (
    Networks,
    Schedule,
    StepLosses,
    evaluation_networks,
    fusable,
)
from hcma_fast.sampling.state import SeparateGraphs, State, StepGraphs
from hcma_fast.specs import GraphName


class ReplaySampler:
    """What :func:`sampling.loop.sample` does, by replays; make one per pipeline.

    Where the engines hold step graphs that can run what is asked for, those are replayed.

    Results are copies, so they belong to the caller. Threads take turns: the buffers are one
    batch's at a time. A new shape takes new buffers and graphs, and the least used go.

    Args:
        device: where engines and buffers are. On "cuda" evaluations are captured as CUDA graphs.
        mode: "step" replays once per evaluation; "trajectory" holds all evaluations in one graph,
            which leaves no place for a callback.
        max_shapes: states that are kept: by batch size, latent size and dtype, with guidance or
            without, by step graphs or not, and savings that change what is launched; with
            "trajectory" also the graphs of each.
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
        self._shapes: OrderedDict[tuple[object, ...], State] = OrderedDict()
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
        """See :func:`sampling.loop.sample`.

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
        networks = evaluation_networks(schedules)
        with self._turn(), torch.no_grad():
            state = self._state(z, conditioning, schedules)
            launches = tuple(state.launches(needed) for needed in networks)
            groups = [launches] if self.mode == "trajectory" else [(one,) for one in launches]
            replays = self._captured(state, groups)
            state.load(z, conditioning, schedules)
            for k, group in enumerate(groups):
                replays[group]()
                if on_evaluation is not None:
                    state.z.copy_(on_evaluation(k, state.latent()))
            return state.latent(), state.losses(schedules, networks)

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

    def _state(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> State:
        """That of this shape, the most recently used last."""
        halves = len(conditioning.text_context) // len(z)
        fused = halves == 2 and fusable(self.engines, schedules)
        captured = self._capture is not no_capture
        with memory_errors():
            key = ("fused" if fused else Kind.of(schedules), halves, *z.shape)
            found = self._shapes.get(key)
            if found is None:
                while len(self._shapes) >= self.max_shapes:
                    self._drop()
                make = StepGraphs if fused else SeparateGraphs
                found = make(self.engines, conditioning, z, schedules, captured=captured)
        self._shapes[key] = found
        self._shapes.move_to_end(key)
        return found

    def _captured(
        self, state: State, groups: Sequence[tuple[Networks, ...]]
    ) -> dict[tuple[Networks, ...], Callable[[], None]]:
        """A replay for each distinct group of evaluations.

        Of whole trajectories the least used others go; single evaluations have few kinds.
        """
        wanted = dict.fromkeys(groups)
        if self.mode == "trajectory":
            others = [group for group in state.captured if group not in wanted]
            excess = len(others) + len(wanted) - max(self.max_shapes, len(wanted))
            if excess > 0 and self._done is not None:
                self._done.synchronize()
            for group in others[: max(0, excess)]:
                del state.captured[group]
        for group in wanted:
            replay = state.captured.pop(group, None)
            if replay is None:
                # warm-ups advance the counters: they begin anew
                state.step.zero_()
                with memory_errors(), capture_errors():
                    replay = self._capture(
                        partial(_advance, state, group), partial(_warm_up, state, group)
                    )
            state.captured[group] = replay
        return state.captured


def _advance(state: State, group: Sequence[Networks]) -> None:
    for networks in group:
        state.advance(networks)


def _warm_up(state: State, group: Sequence[Networks]) -> None:
    _advance(state, sorted(set(group)))
    state.check_capturable()
