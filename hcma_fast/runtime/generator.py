"""Many requests, each with settings of its own, in batches that keep the device busy.

Requests that can share a batch do so whatever their prompts, layouts, seeds, steps, guidance,
rates, lambdas and ends of the gated attention: the sampler reads them from tables with a column per
image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hcma_fast.errors import LOWER_STEP, DeviceMemoryError, DivergenceError, HcmaError, UsageError
from hcma_fast.runtime.engine_room import ends_step
from hcma_fast.runtime.images import pixels_diverged, to_pil
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.runtime.request import Request, Result, as_requests
from hcma_fast.sampling.capture import memory_errors
from hcma_fast.sampling.schedule import Schedule, StepLosses
from hcma_fast.scalars import whole_number
from hcma_fast.torch_state import neutral_torch

_log = logging.getLogger("hcma_fast")


class BatchGenerator:
    """Generates requests in batches over one pipeline, and keeps what they share.

    On a GPU a batch is decoded on a second
    stream while the next one is sampled: leave the pipeline alone until all results are there. Not
    for two threads at once.

    Args:
        max_batch: images at once, at most; less if the engines take fewer. Where memory runs out it
            is halved for good, and the batch is done again in halves.
        cached: keep encodings by content. Without, a batch gives the same bits as a call of the
            pipeline, in torch eager too, whose bits depend on the size of a batch.
    """

    @neutral_torch()
    def __init__(self, pipe: HCMAPipeline, *, max_batch: int = 8, cached: bool = True) -> None:
        try:
            most = whole_number(max_batch)
        except ValueError:
            most = 0
        if most < 1:
            raise UsageError(
                "a batch is a whole number of images, at least 1",
                value=max_batch,
                remedy="Give max_batch=1 or more.",
            )
        self.pipe = pipe
        self.max_batch = min(most, pipe.batch_range.max)
        self._room = pipe.engine_room(cached=cached)
        self._pads = pipe.replay is not None
        on_gpu = torch.device(pipe.device).type == "cuda"
        self._decoder = torch.cuda.Stream(pipe.device) if on_gpu else None

    def generate(
        self, requests: Sequence[Request], on_step: Callable[[int], None] | None = None
    ) -> Iterator[Result]:
        """One result per request, batch by batch; ``Result.index`` says whose it is.

        A request whose latent or image is not finite has an error in its result. All else is
        checked first, for all requests, before anything runs. Errors of one request say which:
        ``error.request``.

        Args:
            on_step: told after each step of a batch of how many images it was one.

        Raises:
            InputError, UsageError: a request is not possible: it is none, its text is too long, or
                the engines do not take it.
            DeviceMemoryError: not even one image fits into memory.
        """
        requests = as_requests(requests)
        with neutral_torch():
            schedules = self._room.plan(requests)
        waiting = [
            group[start : start + self.max_batch]
            for group in group_requests(schedules)
            for start in range(0, len(group), self.max_batch)
        ]
        finish: Callable[[], list[Result]] | None = None
        while waiting:
            indices = waiting.pop(0)
            if len(indices) > self.max_batch:
                waiting[:0] = [indices[: self.max_batch], indices[self.max_batch :]]
                continue
            started, failed = None, None
            try:
                with memory_errors():
                    started = self._start(
                        indices,
                        [requests[i] for i in indices],
                        [schedules[i] for i in indices],
                        on_step,
                    )
            except HcmaError as error:
                # without its traceback, which holds on to the device's memory
                failed = error.with_traceback(None)
                failed.__cause__ = None
            alone = finish is None
            if finish is not None:
                # whatever became of this batch, the one before it is done
                yield from finish()
            finish = started
            if failed is not None:
                if not isinstance(failed, DeviceMemoryError):
                    raise failed
                waiting.insert(0, indices)
                if alone:
                    self._shrink(self._bucket(len(indices)))
            elif self._decoder is None and finish is not None:
                # nothing runs beside the host: no reason to hold results back
                yield from finish()
                finish = None
        if finish is not None:
            yield from finish()

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """The results of one batch, in the order of the requests; it is not divided.

        Raises:
            InputError, UsageError: see :meth:`generate`, or the requests cannot share a batch.
            DivergenceError: an image is not finite. DeviceMemoryError: the batch is too large.
        """
        requests = as_requests(requests)
        with neutral_torch():
            schedules = self._room.plan(requests)
            always = all(schedule.guided_steps == schedule.steps for schedule in schedules)
            self._room.check_batch(len(requests), always)
        with memory_errors():
            results = self._start(range(len(requests)), requests, schedules)()
        for result in results:
            if result.error is not None:
                raise result.error
        return results

    def _shrink(self, failed: int) -> None:
        """After an allocation failed: give back what is kept, and go on with half the batch."""
        if failed <= self.pipe.batch_range.min:
            raise DeviceMemoryError(
                "out of memory with the smallest batch",
                value=failed,
                remedy="Free memory on the device, or use a smaller model or image.",
            )
        self.max_batch = max(failed // 2, self.pipe.batch_range.min)
        self._room.clear()
        if self._decoder is not None:
            torch.cuda.empty_cache()
        _log.warning(
            "Out of memory with %d images at once: going on with %d.", failed, self.max_batch
        )

    @neutral_torch()
    @torch.no_grad()
    def _start(
        self,
        indices: Sequence[int],
        requests: Sequence[Request],
        schedules: Sequence[Schedule],
        on_step: Callable[[int], None] | None = None,
    ) -> Callable[[], list[Result]]:
        """Launch a batch; the function that comes back waits for it, and gives the results."""
        count = len(requests)
        size = self._bucket(count)
        # padding repeats the last request: any valid work will do
        spread = [*range(count), *[count - 1] * (size - count)]
        requests, schedules = [requests[i] for i in spread], [schedules[i] for i in spread]

        def on_evaluation(k: int, z: Tensor) -> Tensor:
            if on_step is not None and (ended := sum(ends_step(s, k) for s in schedules[:count])):
                on_step(ended)
            return z

        watch = None if on_step is None else on_evaluation
        z, losses = self._room.sample(requests, schedules, on_evaluation=watch)
        images, finite, decoded, wait = self._decode(z)

        def finish() -> list[Result]:
            wait()
            pictures = to_pil(images[:count].nan_to_num())
            return [
                self._result(
                    Result(
                        index,
                        pictures[row],
                        z[row],
                        requests[row].seed,
                        image_losses(losses, row, schedules[row]),
                        size,
                    ),
                    schedules[row],
                    (bool(finite[row]), bool(decoded[row])),
                )
                for row, index in enumerate(indices)
            ]

        return finish

    def _bucket(self, count: int) -> int:
        """The batch size to run ``count`` images with.

        Captured graphs and engines of one size have few sizes: the next power of two.
        """
        sizes = self.pipe.batch_range
        if self._pads:
            count = min(1 << (count - 1).bit_length(), self.max_batch)
        return max(count, sizes.min)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Callable[[], None]]:
        """Images on the host, which latents and which images are finite, how to wait for them."""

        def decode() -> tuple[Tensor, Tensor, Tensor]:
            images, finite = self.pipe.decode_all(z)
            return images, z.isfinite().flatten(1).all(1), finite

        if self._decoder is None:
            return *decode(), lambda: None
        self._decoder.wait_stream(torch.cuda.current_stream(z.device))
        with torch.cuda.stream(self._decoder):
            images, finite, decoded = (
                torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(
                    found, non_blocking=True
                )
                for found in decode()
            )
            z.record_stream(self._decoder)
            done = torch.cuda.Event()
            done.record()
        return images, finite, decoded, done.synchronize

    def _result(self, found: Result, schedule: Schedule, finite: tuple[bool, bool]) -> Result:
        """The result, or that of a request whose latent or image is not finite."""
        if all(finite):
            return found
        of_latent, _ = finite
        error = pixels_diverged()
        if not of_latent:
            error = DivergenceError(
                "the latent diverged",
                value=f"rates up to {float(schedule.etas.max()):.3g}, "
                f"guidance_scale {schedule.guidance_scale:g}",
                remedy=LOWER_STEP,
            )
        return replace(found, image=None, error=error.of_request(found.index))


def group_requests(schedules: Sequence[Schedule]) -> list[list[int]]:
    """Numbers of the requests that may share a batch, the longest first within a group.

    With and without guidance are different shapes, and so are latents of different dtypes; and the
    guidance must end at the same evaluation for all, unless it never begins or never ends.
    """
    groups: dict[tuple[str, int | str], list[int]] = {}
    for index, schedule in enumerate(schedules):
        named: dict[int, int | str] = {0: "never", len(schedule.table): "always"}
        guided = int((schedule.table.step_index < schedule.guided_steps).sum())
        key = (schedule.savings.latent_dtype, named.get(guided, guided))
        groups.setdefault(key, []).append(index)

    def cost(index: int) -> tuple[int, int]:
        schedule = schedules[index]
        return -len(schedule.table), -schedule.grounded_unet_steps

    # neighbours of similar length: a batch takes as long as its longest, and the dearer UNet as
    # long as one image needs it
    return [sorted(group, key=cost) for group in groups.values()]


def image_losses(losses: Sequence[StepLosses], row: int, schedule: Schedule) -> list[StepLosses]:
    """Those of one image of a batch, by its own schedule."""
    of_step = {entry.step: entry for entry in losses}
    return [
        StepLosses(
            entry.step,
            entry.timestep,
            of_step[entry.step].loss_global[row],
            of_step[entry.step].loss_local[row],
        )
        for entry, what in zip(schedule.table.evaluations, schedule.alignments(), strict=True)
        if what == "computed"
    ]
