"""The sampler that is captured: equal to the plain one. test_state.py: fit for a CUDA graph.

Without a GPU the captured function is called instead of replayed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hcma_fast.engine import Engine
from hcma_fast.errors import BackendError, UsageError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.capture import CaptureMode, capture_errors, check_capturable
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import Savings
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import GraphName

from captures import LAYOUTS, STEPS, Counted, conditioned, make_engines, noise, plan, relative


@pytest.fixture(scope="module")
def engines(random_components: Components) -> dict[GraphName, Engine]:
    return make_engines(random_components)


@pytest.mark.parametrize("mode", ["step", "trajectory"])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    "schedule",
    [
        plan(),
        plan(eta0=0.0),
        plan(beta=0.5, window=(0.2, 0.7)),
        plan(steps=2, beta=0.0),
        plan(window=(0.2, 0.7), savings=Savings(skip_idle_alignment=False)),
        plan(beta=0.5, savings=Savings(align_every=2, guidance_end=0.7)),
        plan(savings=Savings(align_every=3, latent_dtype="bfloat16")),
        plan(beta=0.5, savings=Savings(contexts_once=False, guidance_end=0.7)),
        plan(beta=0.5, savings=Savings(skip_closed_gate=False, guidance_end=0.7)),
    ],
    ids=[
        "plain",
        "unaligned",
        "window",
        "two-steps",
        "idle",
        "savings",
        "narrow",
        "contexts",
        "gate",
    ],
)
def test_equals_the_plain_sampler(
    engines: dict[GraphName, Engine],
    random_components: Components,
    schedule: Schedule,
    guided: bool,
    mode: CaptureMode,
) -> None:
    given = conditioned(random_components, engines, [0, 1], guided)
    expected, losses = sample(engines, noise([0, 1]), given, schedule)
    sampler = ReplaySampler(engines, "cpu", mode=mode, capture=Counted())
    found, ours = sampler(noise([0, 1]), given, schedule)
    # in bfloat16, whose rounding the last bit of a float32 may tip, 2**-8
    narrow = schedule.savings.latent_dtype == "bfloat16"
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float()) == narrow
    assert relative(found, expected) < (2e-2 if narrow else 1e-5)
    assert [(one.step, one.timestep) for one in ours] == [(o.step, o.timestep) for o in losses]
    for one, other in zip(ours, losses, strict=True):
        near = {"rtol": 1e-2, "atol": 1e-2} if narrow else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(one.loss_global, other.loss_global, **near)
        torch.testing.assert_close(one.loss_local, other.loss_local, **near)


@pytest.mark.parametrize("mode", ["step", "trajectory"])
def test_a_second_batch_finds_nothing_of_the_first(
    engines: dict[GraphName, Engine], random_components: Components, mode: CaptureMode
) -> None:
    """Longer before shorter, aligned before unaligned: leftovers would show."""
    sampler = ReplaySampler(engines, "cpu", mode=mode, capture=Counted())
    runs = [
        ([0, 1], plan(steps=9, eta0=3.0)),
        ([2, 0], plan(steps=4, eta0=1.0, window=(0.5, 1.0))),
        ([1, 2], plan(steps=4, eta0=0.0)),
        ([0, 1], plan(steps=5, savings=Savings(align_every=2))),
        ([2, 1], plan(steps=4, savings=Savings(align_every=3, guidance_end=0.5))),
    ]
    results = []
    for images, schedule in runs:
        given = conditioned(random_components, engines, images)
        expected, _ = sample(engines, noise(images), given, schedule)
        results.append((sampler(noise(images), given, schedule)[0], expected))
    # compared at the end: results are copies, which later batches leave alone
    for found, expected in results:
        assert relative(found, expected) < 1e-5


def test_a_broken_gradient_of_one_batch_is_gone_in_the_next(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    """A rate of 0 in the steps that repeat would not stop it: 0 times NaN is NaN."""
    sampler = ReplaySampler(engines, "cpu")
    given = conditioned(random_components, engines, [0, 1])
    often = plan(savings=Savings(align_every=2))
    broken, _ = sampler(
        noise([0, 1]) * torch.tensor([torch.nan, 1.0]).view(2, 1, 1, 1), given, often
    )
    assert not broken[0].isfinite().any() and bool(broken[1].isfinite().all())
    found, _ = sampler(noise([0, 1]), given, [plan(eta0=0.0), often])
    assert bool(found.isfinite().all())
    alone, _ = sample(
        engines, noise([0]), conditioned(random_components, engines, [0]), plan(eta0=0.0)
    )
    assert relative(found[:1], alone) < 1e-5


@pytest.mark.parametrize("beta", [0.6, 1.0])
def test_images_of_one_batch_may_have_settings_of_their_own(
    engines: dict[GraphName, Engine], random_components: Components, beta: float
) -> None:
    """With the lower beta the last evaluations run the plain UNet."""
    schedules = [
        plan(steps=7, eta0=2.0, guidance=3.0, beta=beta),
        plan(steps=4, eta0=0.5, guidance=7.5, window=(0.0, 0.6), beta=0.5),
        plan(steps=5, eta0=0.0, guidance=1.5, beta=0.0),
        plan(steps=7, eta0=2.0, savings=Savings(align_every=2), beta=0.3),
        plan(
            steps=6, eta0=2.0, savings=Savings(align_every=3, skip_closed_gate=beta < 1), beta=0.6
        ),
    ]
    images = [0, 1, 2, 0, 2]
    together, losses = ReplaySampler(engines, "cpu")(
        noise(images), conditioned(random_components, engines, images), schedules
    )
    for i, (image, schedule) in enumerate(zip(images, schedules, strict=True)):
        given = conditioned(random_components, engines, [image])
        alone, own = sample(engines, noise([image]), given, schedule)
        assert relative(together[i : i + 1], alone) < 1e-5
        of_step = {entry.step: entry for entry in losses}
        for entry in own:
            torch.testing.assert_close(
                of_step[entry.step].loss_global[i : i + 1],
                entry.loss_global,
                rtol=1e-4,
                atol=1e-5,
            )


def test_one_captured_step_replays_for_the_whole_trajectory(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    counted = Counted()
    sampler = ReplaySampler(engines, "cpu", capture=counted)
    given = conditioned(random_components, engines, [0])
    sampler(noise([0]), given, plan(steps=50))
    assert (counted.captures, counted.replays) == (2, 51), "the corrector does not align"
    sampler(noise([0]), given, plan(steps=20, beta=0.5, window=(0.0, 0.7)))
    assert (counted.captures, counted.replays) == (4, 51 + 21)
    sampler(noise([1]), conditioned(random_components, engines, [1]), plan(steps=3))
    assert (counted.captures, counted.replays) == (4, 51 + 21 + 4)


def test_the_trajectory_is_one_replay_without_a_callback(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    counted = Counted()
    sampler = ReplaySampler(engines, "cpu", mode="trajectory", capture=counted)
    given = conditioned(random_components, engines, [0])
    for steps in (3, 4, 5, 6, 7, 3):
        sampler(noise([0]), given, plan(steps=steps))
    assert counted.replays == 6
    assert counted.captures == 6, "four are kept, and the oldest had gone"
    with pytest.raises(UsageError, match="cannot call back"):
        sampler(noise([0]), given, plan(), lambda k, z: z)


def test_shapes_are_kept_up_to_a_bound(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    counted = Counted()
    sampler = ReplaySampler(engines, "cpu", max_shapes=2, capture=counted)

    def run(images: list[int]) -> int:
        before = counted.captures
        sampler(noise(images), conditioned(random_components, engines, images), plan(steps=2))
        return counted.captures - before

    assert [run([0]), run([0, 1]), run([0]), run([0, 1, 2]), run([0]), run([0, 1])] == [
        2,
        2,
        0,
        2,
        0,
        2,
    ]


def test_a_callback_may_change_the_latent_but_not_by_accident(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    given = conditioned(random_components, engines, [0])
    sampler = ReplaySampler(engines, "cpu")
    expected, _ = sample(engines, noise([0]), given, plan())

    def spoil(k: int, z: Tensor) -> Tensor:
        copy = z.clone()
        z.zero_()
        return copy

    found, _ = sampler(noise([0]), given, plan(), spoil)
    assert relative(found, expected) < 1e-5
    for change in (lambda k, z: torch.zeros_like(z), lambda k, z: z.zero_()):
        zeros, _ = sampler(noise([0]), given, plan(), change)
        assert zeros.abs().max() == 0

    def again(k: int, z: Tensor) -> Tensor:
        return sampler(z, given, plan())[0]

    with pytest.raises(UsageError, match="callback cannot generate"):
        sampler(noise([0]), given, plan(), again)
    assert relative(sampler(noise([0]), given, plan())[0], expected) < 1e-5


def test_long_trajectories_stay_inside_their_tables(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    """Warm-ups advance the counter that the next capture's warm-ups start from."""
    given = conditioned(random_components, engines, [0])
    cheap = dict(engines, unet_grounded=Still(engines["unet_grounded"]))
    sampler = ReplaySampler(cheap, "cpu", mode="trajectory", capture=Counted())
    for steps in (400, 300, 999):
        sampler(noise([0]), given, plan(steps=steps, eta0=0.0))
    sampler = ReplaySampler(cheap, "cpu", capture=Counted())
    sampler(noise([0]), given, plan(steps=999, eta0=0.0))
    z, _ = sampler(noise([0]), given, plan(steps=3, eta0=1.0))
    assert z.isfinite().all()


class Still:
    """A UNet that sees no noise."""

    def __init__(self, engine: Engine) -> None:
        self.spec = engine.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"noise_pred": torch.zeros_like(inputs["sample"])}


def test_a_rate_of_zero_keeps_an_image_from_its_neighbours_gradient(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    class Broken(Still):
        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = engines["align"](inputs)
            return {**found, "z_aligned": torch.full_like(found["z_aligned"], torch.nan)}

    given = conditioned(random_components, engines, [0, 1])
    sampler = ReplaySampler(dict(engines, align=Broken(engines["align"])), "cpu")
    z, _ = sampler(noise([0, 1]), given, [plan(), plan(eta0=0.0)])
    alone, _ = sample(
        engines, noise([1]), conditioned(random_components, engines, [1]), plan(eta0=0.0)
    )
    assert z[0].isnan().all() and relative(z[1:], alone) < 1e-5


def test_threads_take_turns_and_samplers_share_nothing(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    given = {i: conditioned(random_components, engines, [i]) for i in range(3)}
    expected = {i: sample(engines, noise([i]), given[i], plan())[0] for i in range(3)}
    one, other = ReplaySampler(engines, "cpu"), ReplaySampler(engines, "cpu")
    wrong: list[float] = []

    def work(sampler: ReplaySampler, image: int) -> None:
        for _ in range(3):
            found, _ = sampler(noise([image]), given[image], plan())
            wrong.append(relative(found, expected[image]))

    threads = [
        threading.Thread(target=work, args=(sampler, image))
        for sampler in (one, other)
        for image in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 18 and max(wrong) < 1e-5


@pytest.mark.parametrize(
    ("mode", "device", "backend", "grad", "problem"),
    [
        ("all", "cuda", "eager", None, "unknown way"),
        ("step", "cpu", "eager", None, "need an NVIDIA GPU"),
        ("step", "cuda", "onnxruntime", None, "cannot be captured"),
        ("step", "cuda", "eager", "onnx", "cannot be captured"),
    ],
)
def test_what_no_graph_can_hold_is_refused(
    mode: str, device: str, backend: str, grad: str | None, problem: str
) -> None:
    with pytest.raises((UsageError, BackendError), match=problem):
        check_capturable(mode, device, backend, grad, {})
    check_capturable("step", "cuda:0", "tensorrt", "triton", {})
    check_capturable("step", "cuda", "tensorrt-rtx", None, {})
    check_capturable("trajectory", "cuda", "torch-compile", None, {})


@pytest.mark.parametrize(
    ("message", "kind"),
    [("launch() API call failed at model.cpp, line 7", BackendError), ("other", RuntimeError)],
)
def test_what_compiled_code_cannot_do_in_a_capture_is_typed(
    message: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=re.escape(message)), capture_errors():
        raise RuntimeError(message)


def test_a_pipeline_draws_the_same_picture_by_replays(random_components: Components) -> None:
    pipe = HCMAPipeline.from_components(random_components)
    given: dict[str, Any] = {"seed": 3, "num_inference_steps": STEPS, "output_type": "np"}
    expected = pipe(["ab", "c"], LAYOUTS[:2], **given)
    with pytest.raises(UsageError, match="NVIDIA GPU"):
        pipe.enable_cuda_graphs()
    pipe.replay = ReplaySampler(pipe.engines, "cpu")
    times: list[int] = []
    found = pipe(
        ["ab", "c"],
        LAYOUTS[:2],
        callback_on_step_end=lambda pipe, step, time, state: times.append(time),
        **given,
    )
    assert relative(found.latents, expected.latents) < 1e-5
    assert abs(found.images - expected.images).max() < 1e-4
    assert times == [entry.timestep for entry in found.losses] and len(times) == STEPS


def test_a_shape_has_forks_of_engines_that_hold_state(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    class Context(Still):
        forks = 0

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            assert self.forks, "the engine of all shapes was run"
            return super().__call__(inputs)

        def fork(self, captured: bool = True) -> Context:
            self.forks += 1
            twin = Context(self)
            twin.forks = 1
            return twin

        def check_capturable(self) -> None:
            """It always is."""

    parent = Context(engines["unet_grounded"])
    sampler = ReplaySampler(dict(engines, unet_grounded=parent), "cpu")
    for images in ([0], [0, 1], [2]):
        sampler(noise(images), conditioned(random_components, engines, images), plan(steps=2))
    assert parent.forks == 2
