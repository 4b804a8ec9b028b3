"""Step graphs in the captured sampler: replayed where they can run, equal to the fused sampler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from hcma_fast.engine import Engine
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.capture import CaptureMode
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import Savings
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import GRAPH_NAMES, STEP_NAMES, GraphName

from captures import LAYOUTS, Counted, Counting, conditioned, make_engines, noise, plan, relative

EVERY = (*GRAPH_NAMES, *STEP_NAMES)


@pytest.fixture(scope="module")
def engines(random_components: Components) -> dict[GraphName, Engine]:
    return make_engines(random_components, names=EVERY)


@pytest.mark.parametrize("mode", ["step", "trajectory"])
@pytest.mark.parametrize(
    ("schedule", "kinds"),
    [(plan(), 1), (plan(beta=0.5), 2), (plan(steps=2, beta=0.0), 1)],
    ids=["plain", "gate", "two-steps"],
)
def test_step_graphs_are_replayed_where_there_are_any(
    engines: dict[GraphName, Engine],
    random_components: Components,
    schedule: Schedule,
    kinds: int,
    mode: CaptureMode,
) -> None:
    given = conditioned(random_components, engines, [0, 1])
    expected, losses = sample(engines, noise([0, 1]), given, schedule)
    calls, captures = Counter[str](), Counted()
    counting: dict[GraphName, Engine] = {n: Counting(e, calls) for n, e in engines.items()}
    sampler = ReplaySampler(counting, "cpu", mode=mode, capture=captures)
    found, ours = sampler(noise([0, 1]), given, schedule)
    # the same engines on the same numbers: not a bit of difference
    assert torch.equal(found, expected)
    assert [(one.step, one.timestep) for one in ours] == [(o.step, o.timestep) for o in losses]
    for one, other in zip(ours, losses, strict=True):
        assert torch.equal(one.loss_global, other.loss_global)
        assert torch.equal(one.loss_local, other.loss_local)
    assert set(calls) <= set(STEP_NAMES)
    assert captures.captures == (kinds if mode == "step" else 1)
    sampler(noise([1, 0]), given, schedule)
    assert captures.captures == (kinds if mode == "step" else 1)


def test_a_fused_batch_finds_nothing_of_the_one_before(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    sampler = ReplaySampler(engines, "cpu", capture=Counted())
    given = conditioned(random_components, engines, [0, 1])
    broken, _ = sampler(noise([0, 1]) * torch.nan, given, plan(steps=9))
    assert not broken.isfinite().any()
    # longer before shorter
    runs = [plan(steps=9, guidance=5.0), plan(steps=4, eta0=0.5), plan(eta0=1.0)]
    results = [sampler(noise([0, 1]), given, schedule)[0] for schedule in runs]
    for schedule, found in zip(runs, results, strict=True):
        assert torch.equal(found, sample(engines, noise([0, 1]), given, schedule)[0])


def test_lambdas_are_each_images_own_in_a_step_graph(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    calls = Counter[str]()
    counting: dict[GraphName, Engine] = {n: Counting(e, calls) for n, e in engines.items()}
    schedules = [plan(lambdas=(1.0, 0.5)), plan(lambdas=(0.1, 2.0))]
    given = conditioned(random_components, engines, [0, 0])
    together, _ = ReplaySampler(counting, "cpu")(noise([0, 0]), given, schedules)
    assert set(calls) == {"step_grounded"}
    assert relative(together[:1], together[1:]) > 1e-4, "the lambdas must matter here"
    for row, schedule in enumerate(schedules):
        given = conditioned(random_components, engines, [0])
        alone, _ = sample(engines, noise([0]), given, schedule)
        assert relative(together[row : row + 1], alone) < 1e-5


def test_images_of_a_step_graph_have_steps_and_guidance_of_their_own(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    for other in (plan(steps=7), plan(guidance=4.0)):
        calls = Counter[str]()
        counting: dict[GraphName, Engine] = {n: Counting(e, calls) for n, e in engines.items()}
        schedules = [plan(), other]
        given = conditioned(random_components, engines, [0, 1])
        together, _ = ReplaySampler(counting, "cpu")(noise([0, 1]), given, schedules)
        assert set(calls) == {"step_grounded"}
        for row, schedule in enumerate(schedules):
            given = conditioned(random_components, engines, [row])
            alone, _ = sample(engines, noise([row]), given, schedule)
            assert relative(together[row : row + 1], alone) < 1e-5


@pytest.mark.parametrize(
    ("schedules", "guided"),
    [
        ([plan(), plan(window=(0.0, 0.6))], True),
        ([plan(eta0=0.0)], True),
        ([plan(window=(0.0, 0.5))], True),
        ([plan(savings=Savings(align_every=2))], True),
        ([plan(savings=Savings(contexts_once=False))], True),
        ([plan(savings=Savings(latent_dtype="bfloat16"))], True),
        ([plan(guidance=1.0)], False),
    ],
    ids=[
        "windows",
        "unaligned",
        "window",
        "repeats",
        "contexts",
        "bfloat16",
        "unguided",
    ],
)
def test_what_no_step_graph_can_do_runs_by_the_separate_graphs(
    engines: dict[GraphName, Engine],
    random_components: Components,
    schedules: list[Schedule],
    guided: bool,
) -> None:
    calls = Counter[str]()
    counting: dict[GraphName, Engine] = {n: Counting(e, calls) for n, e in engines.items()}
    images = [0, 1][: len(schedules)]
    sampler = ReplaySampler(counting, "cpu")
    found, _ = sampler(
        noise(images), conditioned(random_components, engines, images, guided), schedules
    )
    assert not set(calls) & set(STEP_NAMES)
    for row, schedule in enumerate(schedules):
        given = conditioned(random_components, engines, images[row : row + 1], guided)
        alone, _ = sample(engines, noise(images[row : row + 1]), given, schedule)
        narrow = schedule.savings.latent_dtype == "bfloat16"
        assert relative(found[row : row + 1], alone) < (2e-2 if narrow else 1e-5)
    # and back to the step graphs, whose buffers are others
    images = [0]
    given = conditioned(random_components, engines, images)
    again, _ = sampler(noise(images), given, plan())
    assert torch.equal(again, sample(engines, noise(images), given, plan())[0])
    assert calls["step_grounded"] == 7


def test_a_callback_may_replace_the_latent_of_a_step_graph(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    given = conditioned(random_components, engines, [0])

    def halve(k: int, z: Tensor) -> Tensor:
        return z / 2 if k == 3 else z

    found, _ = ReplaySampler(engines, "cpu")(noise([0]), given, plan(), halve)
    expected, _ = sample(engines, noise([0]), given, plan(), halve)
    assert torch.equal(found, expected)


def test_a_pipeline_with_step_graphs_replays_them(random_components: Components) -> None:
    pipe = HCMAPipeline.from_components(random_components)
    calls = Counter[str]()
    pipe.engines = {
        n: Counting(e, calls) for n, e in make_engines(random_components, names=EVERY).items()
    }
    given: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "output_type": "np"}
    expected = pipe(["ab", "c"], LAYOUTS[:2], **given)
    once = Counter(calls)
    assert once["step_grounded"] == 5 and not once["align"]
    pipe.replay = ReplaySampler(pipe.engines, "cpu")
    found = pipe(["ab", "c"], LAYOUTS[:2], **given)
    assert torch.equal(found.latents, expected.latents)
    assert calls == Counter({name: 2 * count for name, count in once.items()})
