"""Many requests, each with settings of its own, in batches that keep the device busy.

Requests that can share a batch do so whatever their prompts, layouts, seeds, steps, guidance,
rates, lambdas and ends of the gated attention: the sampler reads them from tables with a column per
image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from hcma_fast.config import AlignmentSettings
from hcma_fast.engine import Engine
from hcma_fast.errors import DeviceMemoryError, DivergenceError, HcmaError, InputError, UsageError
from hcma_fast.layout import Layout
from hcma_fast.models.text import tokenize
from hcma_fast.runtime.abilities import check_abilities
from hcma_fast.runtime.cached_engine import CachedEngine
from hcma_fast.runtime.hints import give_hints
from hcma_fast.runtime.images import pixels_diverged, to_pil
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.runtime.requests import (
    check_layout,
    noise_from_seeds,
    override_settings,
    spread_seeds,
)
from hcma_fast.sampling.capture import memory_errors, no_capture
from hcma_fast.sampling.conditioning import condition
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import EXACT, Savings, check_savings
from hcma_fast.sampling.schedule import Schedule, StepLosses
from hcma_fast.scalars import whole_number
from hcma_fast.specs import GraphName
from hcma_fast.torch_state import neutral_torch

_ENCODERS: tuple[GraphName, ...] = ("text_encoder", "grounding")
_log = logging.getLogger("hcma_fast")


@dataclass(frozen=True)
class Request:
    """One image that is asked for."""

    prompt: str
    layout: Layout = field(default_factory=Layout.empty)
    seed: int = 0
    negative_prompt: str = ""
    num_inference_steps: int = 50
    settings: AlignmentSettings | None = None
    """None: the checkpoint's own"""
    savings: Savings = EXACT


@dataclass(frozen=True)
class Result:
    """What became of one request: an image, or the error that it alone has."""

    index: int
    """of the request"""
    image: Image.Image | None
    latent: Tensor
    """(4, h, w) float32 on the device, clean and scaled"""
    losses: list[StepLosses]
    """one per step that computed the alignment, of this image: loss_global (), loss_local (M,)"""
    batch_size: int
    """images that were computed together, padding included"""
    error: HcmaError | None = None


class BatchGenerator:
    """Generates requests in batches over one pipeline, and keeps what they share.

    Encodings of texts and layouts are kept by content. On a GPU a batch is decoded on a second
    stream while the next one is sampled: leave the pipeline alone until all results are there. Not
    for two threads at once.

    Args:
        max_batch: images at once, at most; less if the engines take fewer. Where memory runs out it
            is halved for good, and the batch is done again in halves.
    """

    @neutral_torch()
    def __init__(self, pipe: HCMAPipeline, *, max_batch: int = 8) -> None:
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
        self._sampler = pipe.replay or ReplaySampler(pipe.engines, pipe.device, capture=no_capture)
        self._pads = pipe.replay is not None
        self._cached = {name: CachedEngine(pipe.engines[name]) for name in _ENCODERS}
        self._engines: Mapping[GraphName, Engine] = {**pipe.engines, **self._cached}
        on_gpu = torch.device(pipe.device).type == "cuda"
        self._decoder = torch.cuda.Stream(pipe.device) if on_gpu else None

    def generate(self, requests: Sequence[Request]) -> Iterator[Result]:
        """One result per request, batch by batch; ``Result.index`` says whose it is.

        A request whose latent or image is not finite has an error in its result. All else is
        checked first, for all requests, before anything runs. Errors of one request say which:
        ``error.request``.

        Raises:
            InputError, UsageError: a request is not possible: it is none, its text is too long, its
                seed, steps or settings are out of range, or the engines do not take it.
            DeviceMemoryError: not even one image fits into memory.
        """
        requests = _as_requests(requests)
        schedules, groups = self._plan(requests)
        waiting = [
            group[start : start + self.max_batch]
            for group in groups
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
                        indices, [requests[i] for i in indices], [schedules[i] for i in indices]
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

    @neutral_torch()
    def _plan(self, requests: Sequence[Request]) -> tuple[list[Schedule], list[list[int]]]:
        """Each request's schedule, all checked, and the numbers of those that share batches."""
        schedules = []
        known: set[tuple[str, str]] = set()
        for number, request in enumerate(requests):
            with _naming(number):
                schedules.append(self._schedule(request))
                spread_seeds(request.seed, 1)
                self._check_texts(request, known)
        give_hints(
            self.pipe.tokenizer,
            self.pipe.preset,
            [request.prompt for request in requests],
            [request.layout for request in requests],
        )
        return schedules, group_requests(schedules)

    def _schedule(self, request: Request) -> Schedule:
        settings = self.pipe.settings
        if request.settings is not None:
            if not isinstance(request.settings, AlignmentSettings):
                raise UsageError(
                    "settings must be a hcma_fast.config.AlignmentSettings",
                    value=request.settings,
                    remedy="Give pipe.settings.model_copy(update={...}), or None.",
                )
            # pydantic's model_construct checks nothing
            settings = override_settings(settings, **vars(request.settings))
        check_savings(request.savings)
        check_layout(request.layout)
        check_abilities(self.pipe.engines, settings, request.savings, request.layout)
        schedule = Schedule.of(request.num_inference_steps, settings, request.savings)
        always = schedule.guided_steps == schedule.steps
        self.pipe.check_batch(self.pipe.batch_range.min, always)
        if settings.normalized != self.pipe.settings.normalized:
            raise UsageError(
                "whether the step is normalised is a part of the compiled graph",
                value=f"normalized={settings.normalized}",
                remedy="Leave it as the checkpoint has it.",
            )
        return schedule

    def _check_texts(self, request: Request, known: set[tuple[str, str]]) -> None:
        """Layout and texts; those in ``known`` are right already, and right ones are added."""
        check_layout(request.layout)
        texts = [("prompt", request.prompt), ("negative prompt", request.negative_prompt)]
        for kind, text in [*texts, *(("phrase", phrase) for phrase in request.layout.phrases)]:
            # what is no string may not be hashable
            if not isinstance(text, str) or (kind, text) not in known:
                tokenize(self.pipe.tokenizer, [text], kind)
                known.add((kind, text))

    def _shrink(self, failed: int) -> None:
        """After an allocation failed: give back what is kept, and go on with half the batch."""
        if failed <= self.pipe.batch_range.min:
            raise DeviceMemoryError(
                "out of memory with the smallest batch",
                value=failed,
                remedy="Free memory on the device, or use a smaller model or image.",
            )
        self.max_batch = max(failed // 2, self.pipe.batch_range.min)
        self._sampler.clear()
        for cached in self._cached.values():
            cached.clear()
        if self._decoder is not None:
            torch.cuda.empty_cache()
        _log.warning(
            "Out of memory with %d images at once: going on with %d.", failed, self.max_batch
        )

    @neutral_torch()
    @torch.no_grad()
    def _start(
        self, indices: Sequence[int], requests: Sequence[Request], schedules: Sequence[Schedule]
    ) -> Callable[[], list[Result]]:
        """Launch a batch; the function that comes back waits for it, and gives the results."""
        count = len(requests)
        size = self._bucket(count)
        # padding repeats the last request: any valid work will do
        spread = [*range(count), *[count - 1] * (size - count)]
        requests, schedules = [requests[i] for i in spread], [schedules[i] for i in spread]
        guided = schedules[0].guidance_scale > 1
        given = condition(
            self._engines,
            self.pipe.tokenizer,
            [request.prompt for request in requests],
            [request.negative_prompt for request in requests] if guided else None,
            [request.layout for request in requests],
            self.pipe.device,
        )
        shape = tuple(int(n) for n in self.pipe.engines["vae_decoder"].spec.inputs[0].shape[1:])
        seeds = [spread_seeds(request.seed, 1)[0] for request in requests]
        noise = noise_from_seeds(seeds, shape)
        z, losses = self._sampler(noise.to(self.pipe.device), given, schedules)
        images, finite, decoded, wait = self._decode(z)

        def finish() -> list[Result]:
            wait()
            pictures = to_pil(images[:count].nan_to_num())
            return [
                self._result(
                    index, row, size, z, losses, schedules[row], pictures, (finite, decoded)
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

    def _result(
        self,
        index: int,
        row: int,
        size: int,
        z: Tensor,
        losses: Sequence[StepLosses],
        schedule: Schedule,
        pictures: Sequence[Image.Image],
        finite: tuple[Tensor, Tensor],
    ) -> Result:
        own = image_losses(losses, row, schedule)
        of_latent, of_image = (bool(kind[row]) for kind in finite)
        if not of_latent:
            error = DivergenceError(
                "the latent diverged",
                value=f"rates up to {float(schedule.etas.max()):.3g}, "
                f"guidance_scale {schedule.guidance_scale:g}",
                remedy="Lower eta0 or guidance_scale.",
            ).of_request(index)
            return Result(index, None, z[row], own, size, error)
        if not of_image:
            error = pixels_diverged().of_request(index)
            return Result(index, None, z[row], own, size, error)
        return Result(index, pictures[row], z[row], own, size)


def _as_requests(given: Sequence[Request]) -> list[Request]:
    """The requests as a list.

    Raises:
        InputError: one of them is none, or they are no list.
    """
    if isinstance(given, Request) or not isinstance(given, Iterable):
        raise InputError(
            "requests must be a list of Request", value=given, remedy="Write [Request(...)]."
        )
    requests = list(given)
    for number, request in enumerate(requests):
        if not isinstance(request, Request):
            raise InputError(
                "this is no hcma_fast.runtime.generator.Request",
                value=request,
                remedy='Write Request("a dog", Layout(["dog"], [[0.1, 0.1, 0.5, 0.9]])).',
            ).of_request(number)
    return requests


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Errors from within say to which request they belong."""
    try:
        yield
    except HcmaError as error:
        raise error.of_request(number) from error


def group_requests(schedules: Sequence[Schedule]) -> list[list[int]]:
    """Numbers of the requests that may share a batch, the longest first within a group.

    With and without guidance are different shapes, and so are latents of different dtypes; and the
    guidance must end at the same step for all, unless it never begins or never ends.
    """
    groups: dict[tuple[str, int | str], list[int]] = {}
    for index, schedule in enumerate(schedules):
        named: dict[int, int | str] = {0: "never", schedule.steps: "always"}
        guided = schedule.guided_steps
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
