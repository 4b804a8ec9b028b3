"""Requests of all kinds in shared batches: each image is the one that it is alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.config import AlignmentSettings
from hcma_fast.engine import Engine
from hcma_fast.errors import (
    DeviceMemoryError,
    DivergenceError,
    HcmaError,
    InputError,
    SettingsError,
    UsageError,
)
from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.cached_engine import CachedEngine
from hcma_fast.runtime.generator import BatchGenerator, Request, group_requests
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.schedule import Schedule, evaluation_networks
from hcma_fast.specs import BatchRange, IOSpec, TensorSpec

DOG_PIZZA = Layout(["dog", "pizza"], [[0.05, 0.3, 0.45, 0.9], [0.5, 0.5, 0.95, 0.9]])
CAT = Layout(["cat"], [[0.2, 0.1, 0.8, 0.7]])
BASE = AlignmentSettings(eta0=0.5, guidance_scale=3.0)


def settings(**changes: Any) -> AlignmentSettings:
    return BASE.model_copy(update=changes)


REQUESTS = [
    Request("a dog beside a pizza", DOG_PIZZA, 1, num_inference_steps=5),
    Request("a cat", CAT, 2, "rain", 4, settings(eta0=1.5, lambda_local=0.3)),
    Request("nothing", Layout.empty(), 3, "", 3, settings(guidance_scale=7.5, lambda_global=0.2)),
    Request("a cat", CAT, 4, "", 6, settings(eta0=0.0)),
    Request("a dog", DOG_PIZZA, 5, "", 4, settings(guidance_scale=1.0)),
    Request("a dog", DOG_PIZZA, 6, "", 4, settings(window=(0.3, 0.8), guidance_scale=2.0)),
    Request("a pizza", CAT, 7, "", 4, settings(grounding_beta=0.5)),
]


@pytest.fixture
def pipe(random_components: Components) -> HCMAPipeline:
    return HCMAPipeline.from_components(random_components)


def alone(pipe: HCMAPipeline, request: Request) -> Any:
    chosen = request.settings or pipe.settings
    return pipe(
        request.prompt,
        request.layout,
        seed=request.seed,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=chosen.guidance_scale,
        grounding_beta=chosen.grounding_beta,
        eta0=chosen.eta0,
        lambda_global=chosen.lambda_global,
        lambda_local=chosen.lambda_local,
        align_window=chosen.window,
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_each_image_is_the_one_that_it_is_alone(
    pipe: HCMAPipeline, max_batch: int, replay: bool
) -> None:
    expected = [alone(pipe, request) for request in REQUESTS]
    if replay:  # pads batches to powers of two
        pipe.replay = ReplaySampler(pipe.engines, "cpu")
    results = list(BatchGenerator(pipe, max_batch=max_batch).generate(REQUESTS))
    assert sorted(result.index for result in results) == list(range(len(REQUESTS)))
    sizes = sorted(result.batch_size for result in results)
    if max_batch == 8:
        # an early end of the gated attention fits into the others' batch, no guidance does not
        assert sizes == [1, *([8] * 6 if replay else [6] * 6)]
    for result in results:
        reference = expected[result.index]
        assert relative(result.latent, reference.latents[0]) < 1e-5
        assert result.error is None and result.image is not None
        difference = np.abs(np.asarray(result.image) - np.asarray(reference.images[0], float))
        assert difference.max() <= 1
        assert [(one.step, one.timestep) for one in result.losses] == [
            (one.step, one.timestep) for one in reference.losses
        ]
        for mine, theirs in zip(result.losses, reference.losses, strict=True):
            torch.testing.assert_close(mine.loss_local, theirs.loss_local[0], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(
                mine.loss_global, theirs.loss_global[0], rtol=1e-3, atol=1e-5
            )


@given(
    st.lists(
        st.tuples(st.integers(2, 12), st.sampled_from([1.0, 3.0, 9.0]), st.floats(0, 1)),
        min_size=1,
        max_size=12,
    )
)
def test_groups_hold_each_request_once_and_can_run(wanted: list[tuple[int, float, float]]) -> None:
    schedules = [
        Schedule.of(steps, settings(guidance_scale=scale, grounding_beta=beta))
        for steps, scale, beta in wanted
    ]
    groups = group_requests(schedules)
    assert sorted(index for group in groups for index in group) == list(range(len(wanted)))
    for group in groups:
        evaluation_networks([schedules[i] for i in group])  # refuses what needs two UNets at once
        assert len({schedules[i].guidance_scale > 1 for i in group}) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grounding_beta", 1.5),
        ("grounding_beta", math.nan),
        ("grounding_beta", "x"),
        ("guidance_scale", 0.5),
        ("eta0", -1.0),
        ("eta0", math.nan),
        ("window", (0.9, 0.1)),
        ("grounding_betta", 0.2),
    ],
)
def test_settings_that_were_copied_unchecked_are_refused(
    pipe: HCMAPipeline, name: str, value: object
) -> None:
    with pytest.raises(SettingsError, match=name):
        pipe.settings.model_copy(update={name: value})
    # what pydantic does not check
    wrong = AlignmentSettings.model_construct(**{**dict(pipe.settings), name: value})
    object.__setattr__(wrong, name, value)
    requests = [Request("a cat"), Request("a cat", settings=wrong)]
    with pytest.raises(UsageError, match=name) as caught:
        next(iter(BatchGenerator(pipe).generate(requests)))
    assert caught.value.request == 1


def test_images_with_the_same_end_of_gated_attention_are_neighbours() -> None:
    schedules = [Schedule.of(4, settings(grounding_beta=i % 2)) for i in range(6)]
    assert group_requests(schedules) == [[1, 3, 5, 0, 2, 4]]


class Short(EagerEngine):
    """An engine that has no memory for more than so many images."""

    most = 2

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if len(inputs["z"]) > self.most:
            raise DeviceMemoryError("out of memory", remedy="Generate fewer images at once.")
        return super().__call__(inputs)


@pytest.mark.parametrize("graph", ["align", "vae_decoder"])
def test_a_failed_allocation_halves_the_batch_and_loses_nothing(
    pipe: HCMAPipeline,
    random_components: Components,
    graph: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = [Request("a cat", CAT, seed, num_inference_steps=2) for seed in range(9)]
    expected = [alone(pipe, request) for request in requests]
    spec = pipe.engines[graph].spec
    pipe.engines = {**pipe.engines, graph: Short(random_components.graph(graph), spec)}
    generator = BatchGenerator(pipe, max_batch=8)
    with caplog.at_level(logging.WARNING, logger="hcma_fast"):
        results = list(generator.generate(requests))
    assert sorted(result.index for result in results) == list(range(9))
    for result in results:
        assert relative(result.latent, expected[result.index].latents[0]) < 1e-5
    assert generator.max_batch == 2
    assert [r.getMessage() for r in caplog.records] == [
        "Out of memory with 8 images at once: going on with 4.",
        "Out of memory with 4 images at once: going on with 2.",
    ]


def test_no_memory_for_one_image_is_an_error_after_what_was_done(
    pipe: HCMAPipeline, random_components: Components
) -> None:
    engine = Short(random_components.graph("align"), pipe.engines["align"].spec)
    engine.most = 0
    pipe.engines = {**pipe.engines, "align": engine}
    with pytest.raises(DeviceMemoryError, match="smallest batch"):
        list(BatchGenerator(pipe, max_batch=2).generate(REQUESTS[:2]))


def test_a_diverged_image_is_the_only_one_that_fails(pipe: HCMAPipeline) -> None:
    requests = [REQUESTS[0], Request("a cat", CAT, 2, "", 5, settings(eta0=1e38)), REQUESTS[2]]
    results = {r.index: r for r in BatchGenerator(pipe).generate(requests)}
    assert results[0].batch_size == 3
    assert results[0].error is None and results[2].error is None
    assert results[1].image is None
    failed = results[1].error
    assert isinstance(failed, DivergenceError) and failed.request == 1
    assert str(failed).startswith("request 1: the latent diverged (got 'rates up to 9.82e+37")
    expected = alone(pipe, REQUESTS[0])
    assert relative(results[0].latent, expected.latents[0]) < 1e-5


@pytest.mark.parametrize(
    ("bad", "error", "problem"),
    [
        (Request("a " * 80, CAT), InputError, "this prompt has 82 tokens"),
        (Request("a", CAT, negative_prompt="b " * 80), InputError, "negative prompt has 82"),
        (Request("a", Layout(["zqxj" * 40], [[0, 0, 1, 1]])), InputError, "this phrase has"),
        (Request(["a", "b"], CAT), InputError, "must be a string"),  # type: ignore[arg-type]
        (Request("a", None), InputError, "must be a hcma_fast.Layout"),  # type: ignore[arg-type]
        (Request("a", CAT, num_inference_steps=1), UsageError, "steps"),
        (Request("a", CAT, seed=-1), InputError, "seed"),
        (Request("a", CAT, settings=settings(normalized=True)), UsageError, "normalised"),
    ],
)
def test_an_impossible_request_is_refused_before_any_work(
    pipe: HCMAPipeline, bad: Request, error: type[Exception], problem: str
) -> None:
    calls: list[str] = []

    class Watched:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.spec = engine, engine.spec

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            calls.append(self.spec.graph)
            return self.engine(inputs)

    watched: Any = {name: Watched(engine) for name, engine in pipe.engines.items()}
    pipe.engines = watched
    generator = BatchGenerator(pipe)
    # the third: one with the same fault behind it is not the one to name
    with pytest.raises(error, match=f"^request 2: .*{problem}") as found:
        list(generator.generate([REQUESTS[0], REQUESTS[1], bad, bad]))
    assert isinstance(found.value, HcmaError) and found.value.request == 2
    assert not calls
    assert len(list(generator.generate(REQUESTS[:1]))) == 1 and calls, "the next ones are served"


def test_no_requests_give_no_results(pipe: HCMAPipeline) -> None:
    assert list(BatchGenerator(pipe).generate([])) == []
    with pytest.raises(UsageError, match="at least 1"):
        BatchGenerator(pipe, max_batch=0)


def test_texts_and_layouts_are_encoded_once(pipe: HCMAPipeline) -> None:
    calls: list[int] = []

    class Counting:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.spec = engine, engine.spec

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            calls.append(len(next(iter(inputs.values()))))
            return self.engine(inputs)

    counted: Any = {name: Counting(pipe.engines[name]) for name in ("text_encoder", "grounding")}
    pipe.engines = {**pipe.engines, **counted}
    generator = BatchGenerator(pipe)
    first = list(generator.generate(REQUESTS[:2]))
    assert calls
    calls.clear()
    again = list(generator.generate(REQUESTS[:2]))
    assert not calls
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.latent, other.latent)


class Doubler:
    """Row by row: y = 2 x, for batches of 2 or 3."""

    spec = IOSpec(
        "text_encoder",
        (TensorSpec("x", ("batch", 2)),),
        (TensorSpec("y", ("batch", 2)),),
        BatchRange(2, 2, 3),
    )

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert 2 <= len(inputs["x"]) <= 3
        self.calls.append(len(inputs["x"]))
        return {"y": 2 * inputs["x"]}


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=7), max_size=6), st.integers(0, 5))
def test_a_cached_engine_gives_what_the_engine_gives(batches: list[list[int]], room: int) -> None:
    engine = Doubler()
    cached = CachedEngine(engine, max_bytes=8 * room)
    for batch in batches:
        x = torch.tensor(batch).float()[:, None].expand(-1, 2)
        assert torch.equal(cached({"x": x})["y"], 2 * x)
        assert cached.bytes <= 8 * room
    if room == 5 and len({value for batch in batches for value in batch}) <= 5:
        assert cached.misses == len({value for batch in batches for value in batch})


def test_the_rows_that_were_used_last_are_kept() -> None:
    cached = CachedEngine(Doubler(), max_bytes=3 * 8)

    def computed(*values: int) -> int:
        before = cached.misses
        cached({"x": torch.tensor(values).float()[:, None].expand(-1, 2)})
        return cached.misses - before

    assert [computed(1), computed(2), computed(3)] == [1, 1, 1]
    # 1 is used again, so that 2 goes for 4
    assert [computed(1), computed(4), computed(1), computed(3), computed(2)] == [0, 1, 0, 0, 1]


class Deferred:
    """A generator as on a GPU: a batch is handed out when it is waited for.

    Args:
        fails_at: which batches find no memory, counted from 1.
    """

    def __init__(self, generator: BatchGenerator, fails_at: tuple[int, ...]) -> None:
        self.events: list[str] = []
        self.started, self.fails_at = 0, fails_at
        self.sampler, self.pipe = generator._sampler, generator.pipe
        own: Any = generator
        own._sampler, own._decode, own._decoder = self, self.wait_later, object()

    def __call__(self, z: Tensor, *given: Any) -> Any:
        self.started += 1
        self.events.append(f"start {len(z)}")
        if self.started in self.fails_at:
            raise DeviceMemoryError("out of memory", remedy="Generate fewer images at once.")
        return self.sampler(z, *given)

    def clear(self) -> None:
        self.sampler.clear()

    def wait_later(self, z: Tensor) -> Any:
        finite = z.isfinite().flatten(1).all(1)
        images, decoded = self.pipe.decode_all(z)
        return images, finite, decoded, lambda: self.events.append(f"wait {len(z)}")


@pytest.mark.parametrize("fails_at", [(), (2,), (2, 3)])
def test_a_batch_is_waited_for_when_the_next_one_has_started(
    pipe: HCMAPipeline, fails_at: tuple[int, ...]
) -> None:
    """On a GPU; and where the next finds no memory, it is tried again once this one is done."""
    requests = [Request("a cat", CAT, seed, num_inference_steps=3) for seed in range(4)]
    generator = BatchGenerator(pipe, max_batch=2)
    deferred = Deferred(generator, fails_at)
    results = list(generator.generate(requests))
    assert [result.index for result in results] == [0, 1, 2, 3]
    expected = {
        (): ["start 2", "start 2", "wait 2", "wait 2"],
        # alone with the memory, at the same size
        (2,): ["start 2", "start 2", "wait 2", "start 2", "wait 2"],
        # and only then by halves
        (2, 3): [
            *("start 2", "start 2", "wait 2", "start 2"),
            *("start 1", "start 1", "wait 1", "wait 1"),
        ],
    }
    assert deferred.events == expected[fails_at]
    assert generator.max_batch == (1 if fails_at == (2, 3) else 2)
    for result, request in zip(results, requests, strict=True):
        assert relative(result.latent, alone(pipe, request).latents[0]) < 1e-5


@pytest.mark.gpu
def test_batches_on_a_gpu_with_graphs(random_components: Components) -> None:
    """Nobody has run this yet."""
    torch.backends.cudnn.allow_tf32 = False
    pipe = HCMAPipeline.from_components(random_components, device="cuda")
    expected = [alone(pipe, request) for request in REQUESTS]
    pipe.enable_cuda_graphs()
    for result in BatchGenerator(pipe, max_batch=4).generate(REQUESTS):
        assert relative(result.latent, expected[result.index].latents[0]) < 1e-4
