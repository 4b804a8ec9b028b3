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
from importlib.util import find_spec
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.errors import BackendError, DeviceMemoryError, InputError, UsageError
from hcma_fast.kernels.denoise_update import COLUMNS, RING, denoise_table, denoise_update_
from hcma_fast.runtime.engine import Engine
from hcma_fast.runtime.sampler import Conditioning, Schedule, StepLosses
from hcma_fast.specs import PLAN_ROWS, GraphName

CaptureMode = Literal["step", "trajectory"]
Kind = tuple[bool, bool]
"""Of an evaluation: whether it aligns, and whether its attention is gated."""
Capture = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]
"""From a function, and one to warm up with, to a function that does the same again as the first, at
the same addresses."""
CAPTURABLE = ("eager", "tensorrt")
"""Backends whose work goes to torch's stream, where a CUDA graph catches it. TensorRT-RTX needs
engines that were built for it (REQUIRE_USER_ALLOCATION), and kernels compiled beforehand."""
_WARM_UPS = 3


def check_capturable(mode: str, device: str, backend: str, grad_backend: str | None) -> None:
    """Refuse what no CUDA graph can hold.

    Raises:
        UsageError: an unknown mode, or a device without CUDA graphs.
        BackendError: a backend that runs elsewhere than on torch's stream, or no Triton.
    """
    if mode not in get_args(CaptureMode):
        raise UsageError(
            "unknown way to capture",
            value=mode,
            remedy=f"Use one of {', '.join(get_args(CaptureMode))}.",
        )
    if torch.device(device).type != "cuda":
        raise UsageError(
            "CUDA graphs need an NVIDIA GPU",
            value=device,
            remedy='Leave them off, or load the pipeline with device="cuda".',
        )
    if backend not in CAPTURABLE or grad_backend == "onnx":
        raise BackendError(
            "this backend's work cannot be captured as a CUDA graph",
            value="the gradient by onnx" if backend in CAPTURABLE else backend,
            remedy=f"Use {', '.join(CAPTURABLE)}, and a gradient other than onnx.",
        )
    if find_spec("triton") is None:
        raise BackendError(
            "the captured sampler updates the latent by a Triton kernel, and Triton is missing",
            remedy='Run pip install "hcma-fast[gpu]".',
        )


class CudaGraphs:
    """Captures functions of no argument; the graphs share the memory of their intermediates.

    That is safe because they run one after the other, and leave nothing there that outlives them.
    """

    _one_at_a_time = threading.Lock()
    """CUDA allows one capture in a process"""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        # Of their own: cuBLAS keeps a workspace per stream, and that of torch's shared capture
        # stream would belong to whichever sampler came first. Warm-ups run on another one, lest
        # their workspace lie outside of the pool.
        self.stream, self.warm_up_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def __call__(
        self, function: Callable[[], None], warm_up: Callable[[], None]
    ) -> Callable[[], None]:
        """A function that replays what ``function`` launches."""
        current = torch.cuda.current_stream(self.device)
        self.warm_up_stream.wait_stream(current)
        with torch.cuda.stream(self.warm_up_stream):
            for _ in range(_WARM_UPS):
                warm_up()
        current.wait_stream(self.warm_up_stream)
        self.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        # the outer context leaves the stream even where the end of the capture fails; other
        # threads may go on using the GPU
        with (
            self._one_at_a_time,
            torch.cuda.stream(self.stream),
            torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            function()
        current.wait_stream(self.stream)
        return graph.replay


def no_capture(function: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
    """Stands in for :class:`CudaGraphs` where there are none: the function is called again."""
    return function


@runtime_checkable
class Forkable(Protocol):
    """An engine that holds state for the shape it runs, as TensorRT's context does."""

    def fork(self) -> Engine:
        """The same engine with state of its own."""
        ...


class Trajectory:
    """Buffers of one shape, the evaluation that works on them, and what was captured of it.

    Args:
        batch: images B; halves: 2 with guidance, 1 without; latent: (C, h, w); like: for the widths
        and dtypes of the conditioning.
    """

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        like: Conditioning,
        latent: tuple[int, ...],
        halves: int,
        device: torch.device,
    ) -> None:
        # an engine that is captured for one shape must not be set to another
        self.engines: Mapping[GraphName, Engine] = {
            name: engine.fork() if isinstance(engine, Forkable) else engine
            for name, engine in engines.items()
        }
        self.halves = halves
        batch = len(like.caption_embedding)
        self.batch = batch
        self.z = torch.zeros(batch, *latent, device=device)
        self.stored = torch.zeros_like(self.z)
        self.history = torch.zeros(RING, *self.z.shape, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        # an entry per evaluation, then per image; the rows behind the last evaluation stay unused
        self.timesteps = torch.zeros(PLAN_ROWS, batch, dtype=torch.int64, device=device)
        self.etas = torch.zeros(PLAN_ROWS, batch, device=device)
        self.loss_global = torch.zeros(PLAN_ROWS, batch, device=device)
        self.loss_local = torch.zeros(PLAN_ROWS, batch, MAX_OBJECTS, device=device)
        self.table = torch.zeros(batch, PLAN_ROWS, COLUMNS, device=device)
        self.lambdas = torch.zeros(batch, 2, device=device)
        self.conditioning = Conditioning(
            **{name: torch.zeros_like(value) for name, value in vars(like).items()}
        )
        # what the engines read in this evaluation
        self.time = torch.zeros(1, batch, dtype=torch.int64, device=device)
        self.eta = torch.zeros(1, batch, device=device)
        self.moves = torch.zeros(1, batch, dtype=torch.bool, device=device)
        self.doubled = torch.zeros(halves, *self.z.shape, device=device)
        self.times = torch.zeros(halves, batch, dtype=torch.int64, device=device)
        self.captured: dict[tuple[Kind, ...], Callable[[], None]] = {}
        fixed = vars(self.conditioning)
        self.align_inputs = {
            **fixed,
            "z": self.z,
            "eta": self.eta[0],
            "timestep": self.time[0],
            "lambdas": self.lambdas,
        }
        self.unet_inputs = {
            **fixed,
            "sample": self.doubled.flatten(0, 1),
            "timestep": self.times.flatten(),
        }

    def evaluate(self, aligns: bool, gated: bool) -> None:
        """One evaluation: align, denoise, combine, step. All of it on the device, in place."""
        torch.index_select(self.timesteps, 0, self.step, out=self.time)
        if aligns:
            torch.index_select(self.etas, 0, self.step, out=self.eta)
            aligned = self.engines["align"](self.align_inputs)
            # a rate of 0 leaves an image as it is, whatever the gradient
            torch.gt(self.eta, 0, out=self.moves)
            moves = self.moves.view(-1, *[1] * (self.z.dim() - 1))
            torch.where(moves, aligned["z_aligned"], self.z, out=self.z)
            self.loss_global.index_copy_(0, self.step, aligned["loss_global"].unsqueeze(0))
            self.loss_local.index_copy_(0, self.step, aligned["loss_local"].unsqueeze(0))
        self.doubled.copy_(self.z)
        self.times.copy_(self.time)
        unet = self.engines["unet_grounded" if gated else "unet_plain"]
        eps = unet(self.unet_inputs)["noise_pred"]
        unconditional = eps[: self.batch] if self.halves == 2 else None
        conditional = eps[-self.batch :]
        denoise_update_(
            self.z, self.history, self.stored, unconditional, conditional, self.table, self.step
        )
        self.step.add_(1)

    def load(self, z: Tensor, conditioning: Conditioning, schedules: Sequence[Schedule]) -> None:
        """Copy a batch into the buffers: the only writes from the host, before all evaluations.

        Args:
            schedules: one per image, or one for all.
        """
        self.z.copy_(z)
        for name, buffer in vars(self.conditioning).items():
            buffer.copy_(getattr(conditioning, name))
        self.lambdas.copy_(torch.tensor([schedule.lambdas for schedule in schedules]))
        # behind an image's last evaluation its rate is 0, and its row of the table changes nothing
        timesteps = torch.zeros(len(schedules), PLAN_ROWS, dtype=torch.int64)
        etas = torch.zeros(len(schedules), PLAN_ROWS)
        for row, schedule in enumerate(schedules):
            timesteps[row, : len(schedule.table)] = schedule.table.timesteps
            etas[row, : len(schedule.table)] = schedule.etas
        self.timesteps.copy_(timesteps.T)
        self.etas.copy_(etas.T)
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
        max_shapes: shapes that are kept: batch size, latent size, with guidance or without.
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
        self._shapes: OrderedDict[tuple[int, ...], Trajectory] = OrderedDict()
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
            InputError: images of one batch need different UNets in the same evaluation.
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
            batch = self._buffers(z, conditioning)
            replays = self._captured(batch, groups)
            batch.load(z, conditioning, schedules)
            for k, group in enumerate(groups):
                replays[group]()
                if on_evaluation is not None:
                    batch.z.copy_(on_evaluation(k, batch.z.clone()))
            count = len(kinds)
            result = batch.z.clone()
            loss_global = batch.loss_global[:count].clone()
            loss_local = batch.loss_local[:count].clone()
        rows = max((s.table for s in schedules), key=len).rows()
        losses = [
            StepLosses(row.step, row.timestep, loss_global[k], loss_local[k])
            for k, (row, (aligns, _)) in enumerate(zip(rows, kinds, strict=True))
            if aligns
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

    def _buffers(self, z: Tensor, conditioning: Conditioning) -> Trajectory:
        """Those of this shape, the most recently used last."""
        halves = len(conditioning.text_context) // len(z)
        key = (halves, *z.shape)
        found = self._shapes.get(key)
        if found is None:
            while len(self._shapes) >= self.max_shapes:
                self._drop()
            with memory_errors():
                found = Trajectory(self.engines, conditioning, z.shape[1:], halves, self.device)
        self._shapes[key] = found
        self._shapes.move_to_end(key)
        return found

    def _captured(
        self, batch: Trajectory, groups: Sequence[tuple[Kind, ...]]
    ) -> dict[tuple[Kind, ...], Callable[[], None]]:
        """A replay for each distinct group of evaluations."""

        def run(group: Sequence[Kind]) -> None:
            for kind in group:
                batch.evaluate(*kind)

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
        InputError: in one evaluation some images need gated attention, and others none.
    """
    kinds: list[Kind] = []
    plans = [(s.table.rows(), (s.etas > 0).tolist(), s.grounded_steps) for s in schedules]
    for k in range(max(len(rows) for rows, _, _ in plans)):
        running = [plan for plan in plans if k < len(plan[0])]
        aligns = any(moves[k] for _, moves, _ in running)
        gated = {rows[k].step < steps for rows, _, steps in running}
        if len(gated) > 1:
            raise InputError(
                "images of one batch must switch off the gated attention at the same step",
                value=[s.grounding_beta for s in schedules],
                remedy="Give them the same grounding_beta and number of steps, or beta 1.",
            )
        kinds.append((aligns, gated.pop()))
    return tuple(kinds)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raises DeviceMemoryError where torch lacks memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            "out of memory for the sampler's buffers and graphs",
            remedy="Generate fewer images at once.",
        ) from error


@contextmanager
def capture_errors() -> Iterator[None]:
    """Raises BackendError where CUDA refuses to capture, DeviceMemoryError for want of memory."""
    try:
        yield
    except torch.AcceleratorError as error:
        if "out of memory" in str(error):
            raise DeviceMemoryError(
                "out of memory for a CUDA graph", remedy="Generate fewer images at once."
            ) from error
        raise BackendError(
            f"the evaluation cannot be captured as a CUDA graph: {error}",
            remedy="Leave CUDA graphs off, and report it with the output of hcma-fast doctor.",
        ) from error
