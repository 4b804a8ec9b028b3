"""From requests to latents: what every way to generate an image goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

from torch import Tensor
from transformers import CLIPTokenizer

from hcma_fast.config import AlignmentSettings, Sampler
from hcma_fast.engine import Engine
from hcma_fast.errors import HcmaError, InputError, Remedy, UsageError
from hcma_fast.models.checkpoint.info import CheckpointInfo
from hcma_fast.models.text import tokenize
from hcma_fast.runtime.abilities import check_abilities
from hcma_fast.runtime.arguments import noise_from_seeds
from hcma_fast.runtime.cached_engine import CachedEngine
from hcma_fast.runtime.hints import give_hints
from hcma_fast.runtime.request import Request
from hcma_fast.sampling.capture import no_capture
from hcma_fast.sampling.conditioning import condition
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import Savings
from hcma_fast.sampling.schedule import Schedule, StepLosses
from hcma_fast.sampling.solvers import Solver, ddim, plms
from hcma_fast.specs import GraphName

SOLVERS: Mapping[Sampler, Solver] = {"plms": plms, "ddim": ddim}
"""The solver that each name of ``config.Sampler`` stands for."""
_ENCODERS: tuple[GraphName, ...] = ("text_encoder", "grounding")


class EngineRoom:
    """Checks requests against the engines, and runs batches of them.

    Args:
        replay: samples in place of the plain loop, see ``HCMAPipeline.enable_cuda_graphs``.
        cached: keep encodings of texts and layouts by content, for many requests that share them.
    """

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        tokenizer: CLIPTokenizer,
        info: CheckpointInfo,
        device: str,
        *,
        replay: ReplaySampler | None = None,
        cached: bool = False,
    ) -> None:
        self.engines, self.tokenizer, self.info, self.device = engines, tokenizer, info, device
        self.batch_range = engines["vae_decoder"].spec.batch
        self.replay = replay
        self._rows: ReplaySampler | None = replay
        self._caches = {n: CachedEngine(engines[n]) for n in _ENCODERS} if cached else {}
        self._encoders: Mapping[GraphName, Engine] = {**engines, **self._caches}

    def plan(self, requests: Sequence[Request]) -> list[Schedule]:
        """Each request's schedule; nothing runs before all requests are found to be possible.

        Errors of one request say which: ``error.request``.

        Raises:
            InputError: a text is too long. UsageError: the engines do not take its settings.
        """
        schedules = []
        known: set[tuple[str, str]] = set()
        for number, request in enumerate(requests):
            with _naming(number):
                schedules.append(self.schedule(request))
                self._check_texts(request, known)
        self.hint(requests)
        return schedules

    def schedule(self, request: Request) -> Schedule:
        """What the sampler does for this request; equal ones are one object.

        Raises:
            UsageError: the engines do not take its settings.
        """
        own = self.info.alignment
        settings = request.settings.over(own)
        check_abilities(self.engines, settings, request.savings, request.layout)
        schedule = _schedule(
            request.sampler, request.num_inference_steps, settings, request.savings
        )
        self.check_batch(self.batch_range.min, schedule.guided_steps == schedule.steps)
        if settings.normalized != own.normalized:
            raise UsageError(
                "whether the step is normalised is a part of the compiled graph",
                value=f"normalized={settings.normalized}",
                remedy="Leave it as the checkpoint has it.",
            )
        return schedule

    def check_batch(self, batch: int, guided: bool) -> None:
        """Whether the engines take this many images at once, with guidance or without.

        Raises:
            InputError: too few or too many. UsageError: none without guidance.
        """
        images = self.batch_range
        if not images.min <= batch <= images.max:
            raise InputError(
                f"these engines were built for batches of {images}",
                value=batch,
                remedy="Generate as many images at once, or build for more with --batch.",
            )
        if images.static and not guided:
            raise UsageError(
                "engines of one batch size always compute both halves of the guidance",
                value=images.min,
                remedy=Remedy(
                    "Use a guidance_scale above 1 to the end, or build with a range such as "
                    "--batch 1:1:4.",
                    "Use --guidance-scale above 1 to the end, or build with a range such as "
                    "--batch 1:1:4.",
                ),
            )

    def _check_texts(self, request: Request, known: set[tuple[str, str]]) -> None:
        """Those in ``known`` are right already, and right ones are added."""
        texts = [("prompt", request.prompt), ("negative prompt", request.negative_prompt)]
        texts += [("phrase", phrase) for phrase in request.layout.phrases]
        for kind, text in texts:
            if (kind, text) not in known:
                tokenize(self.tokenizer, [text], kind)
                known.add((kind, text))

    def hint(self, requests: Sequence[Request]) -> None:
        """Warn of requests that run, and probably do not do what was meant."""
        give_hints(
            self.tokenizer,
            self.info.preset,
            [request.prompt for request in requests],
            [request.layout for request in requests],
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(4, h, w) of one image."""
        return tuple(int(n) for n in self.engines["vae_decoder"].spec.inputs[0].shape[1:])

    def sample(
        self,
        requests: Sequence[Request],
        schedules: Sequence[Schedule],
        noise: Tensor | None = None,
        on_evaluation: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, list[StepLosses]]:
        """Clean scaled latents (B, 4, h, w) of one batch, and its losses.

        Args:
            schedules: of the requests, see :meth:`plan`.
            noise: (B, 4, h, w) to start from; by default from the requests' seeds.
            on_evaluation: see :func:`hcma_fast.sampling.loop.sample`.
        """
        guided = schedules[0].guidance_scale > 1
        given = condition(
            self._encoders,
            self.tokenizer,
            [request.prompt for request in requests],
            [request.negative_prompt for request in requests] if guided else None,
            [request.layout for request in requests],
            self.device,
        )
        if noise is None:
            noise = noise_from_seeds([request.seed for request in requests], self.latent_shape)
        z, first = noise.to(self.device), schedules[0]
        if any(schedule is not first for schedule in schedules):
            if self._rows is None:
                self._rows = ReplaySampler(self.engines, self.device, capture=no_capture)
            return self._rows(z, given, schedules, on_evaluation)
        if self.replay is not None:
            return self.replay(z, given, first, on_evaluation)
        return sample(self.engines, z, given, first, on_evaluation)

    def clear(self) -> None:
        """Give back the memory of what is kept between batches."""
        if self._rows is not None:
            self._rows.clear()
        for cached in self._caches.values():
            cached.clear()


@lru_cache(maxsize=256)
def _schedule(
    sampler: Sampler, steps: int, settings: AlignmentSettings, savings: Savings
) -> Schedule:
    return Schedule.of(steps, settings, savings, SOLVERS[sampler])


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Errors from within say to which request they belong."""
    try:
        yield
    except HcmaError as error:
        raise error.of_request(number) from error


def ends_step(schedule: Schedule, k: int) -> bool:
    """Whether evaluation ``k`` is the last of a step; PLMS has two in its first."""
    steps = schedule.table.step_index
    return k < len(steps) and (k + 1 == len(steps) or bool(steps[k + 1] != steps[k]))
