"""The captured sampler with real CUDA graphs: equal, and without a launch or a wait of the host.

Nobody has run these yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.sampling.capture import CaptureMode
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import Savings
from hcma_fast.sampling.schedule import Schedule, evaluation_networks
from hcma_fast.specs import GRAPH_NAMES, STEP_NAMES

from captures import conditioned, make_engines, noise, plan, relative

pytestmark = pytest.mark.gpu

GATED = plan(steps=20, beta=0.5, window=(0.0, 0.8))
ALIGNED = plan(steps=20, beta=0.5)
FRUGAL = plan(steps=20, savings=Savings(align_every=3, guidance_end=0.7, latent_dtype="bfloat16"))
CLOSED = Savings(contexts_once=False, guidance_end=0.7, skip_closed_gate=False)
AGAIN = plan(steps=20, beta=0.5, savings=CLOSED)
MODES = pytest.mark.parametrize("mode", ["step", "trajectory"])
CASES = pytest.mark.parametrize(
    ("schedule", "fused"),
    [(GATED, False), (FRUGAL, False), (AGAIN, False), (ALIGNED, True)],
    ids=["separate", "frugal", "again", "fused"],
)


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_waits() -> Iterator[None]:
    """What would make the host wait for the GPU is an error in here."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays_of(
    sampler: ReplaySampler, schedule: Schedule
) -> tuple[list[Callable[[], None]], torch.Tensor]:
    """Those of all evaluations, from the one shape that was sampled; and the counter."""
    (batch,) = sampler._shapes.values()
    launches = [batch.launches(kind) for kind in evaluation_networks([schedule])]
    groups: Sequence[tuple[object, ...]] = (
        [tuple(launches)] if sampler.mode == "trajectory" else [(one,) for one in launches]
    )
    return [batch.captured[group] for group in groups], batch.step  # type: ignore[index]


@MODES
@CASES
def test_cuda_graphs_equal_the_plain_sampler(
    random_components: Components, schedule: Schedule, fused: bool, mode: CaptureMode
) -> None:
    names = (*GRAPH_NAMES, *STEP_NAMES) if fused else GRAPH_NAMES
    engines = make_engines(random_components, "cuda", names)
    sampler = ReplaySampler(engines, "cuda", mode=mode)
    narrow = schedule.savings.latent_dtype == "bfloat16"
    for images in ([0, 1], [2], [1, 0]):
        given = conditioned(random_components, engines, images, device="cuda")
        expected, _ = sample(engines, noise(images).cuda(), given, schedule)
        found, _ = sampler(noise(images).cuda(), given, schedule)
        assert relative(found, expected) < (2e-2 if narrow else 1e-4)


@MODES
@CASES
def test_replays_allocate_nothing_wait_for_nothing_and_are_one_launch_each(
    random_components: Components, schedule: Schedule, fused: bool, mode: CaptureMode
) -> None:
    names = (*GRAPH_NAMES, *STEP_NAMES) if fused else GRAPH_NAMES
    engines = make_engines(random_components, "cuda", names)
    sampler = ReplaySampler(engines, "cuda", mode=mode)
    given = conditioned(random_components, engines, [0, 1], device="cuda")
    sampler(noise([0, 1]).cuda(), given, schedule)
    replays, step = replays_of(sampler, schedule)
    assert len(replays) == (1 if mode == "trajectory" else 21)
    step.zero_()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waits():
        for replay in replays:
            replay()
    assert int(step) == 21
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    step.zero_()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for replay in replays:
            replay()
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["cudaGraphLaunch"] == len(replays)
    others = ("cudaLaunchKernel", "cudaMemcpy", "cudaMalloc", "cuLaunchKernel")
    assert not [name for name in calls if name.startswith(others)], calls


def test_the_watches_themselves_see_something() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
        float(torch.ones(1, device="cuda"))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.ones(1, device="cuda")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before


def test_repeated_calls_keep_no_memory(random_components: Components) -> None:
    engines = make_engines(random_components, "cuda")
    sampler = ReplaySampler(engines, "cuda")
    given = conditioned(random_components, engines, [0, 1], device="cuda")
    held = []
    for _ in range(5):
        sampler(noise([0, 1]).cuda(), given, GATED)
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(held[1:])) == 1, held
