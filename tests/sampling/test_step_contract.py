"""One contract for all that computes a step: eager, captured, exported, and the op's reference.

tests/kernels/interpreted/cases_updates.py holds the Triton kernel to the same reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from step_contract import (
    SHAPE,
    SOLVERS,
    Function,
    align,
    align_function,
    expected,
    make_schedule,
    predict,
    start,
    unet_function,
)
from torch import Tensor, nn

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.engine import Engine
from hcma_fast.kernels.denoise_update import denoise_update_
from hcma_fast.sampling.capture import CaptureMode
from hcma_fast.sampling.conditioning import Conditioning
from hcma_fast.sampling.exported import FusedStep
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import HISTORY, GraphName

from captures import Counted

SEPARATE: dict[GraphName, Engine] = {
    "align": Function(align_function),
    "unet_grounded": Function(unet_function),
    "unet_plain": Function(unet_function),
}
Executor = Callable[[Sequence[Schedule], Tensor], Tensor]


def conditioning(batch: int) -> Conditioning:
    """Contexts of the two halves differ; nothing else is looked at."""
    halves = torch.arange(2.0).repeat_interleave(batch).view(-1, 1, 1)
    empty = torch.zeros(batch, 1)
    return Conditioning(halves, halves, *[empty] * 4, torch.zeros(batch, 1, 4), halves)


class AlignModule(nn.Module):
    def forward(self, z: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        eta = given[4]
        return align(z, eta), z.flatten(1).mean(1), torch.zeros(len(z), MAX_OBJECTS)


class UNetModule(nn.Module):
    def forward(self, z: Tensor, timestep: Tensor, text: Tensor, *rest: Tensor) -> tuple[Tensor]:
        return (predict(z, timestep, text[:, 0, 0].view(-1, 1, 1, 1)),)


def eager(schedules: Sequence[Schedule], z: Tensor) -> Tensor:
    rows = [
        sample(SEPARATE, z[i : i + 1], conditioning(1), schedule)[0]
        for i, schedule in enumerate(schedules)
    ]
    return torch.cat(rows)


def captured(mode: CaptureMode, step_graphs: bool = False) -> Executor:
    def run(schedules: Sequence[Schedule], z: Tensor) -> Tensor:
        engines = {**SEPARATE, **(STEPS if step_graphs else {})}
        sampler = ReplaySampler(engines, "cpu", mode=mode, capture=Counted())
        return sampler(z, conditioning(len(z)), schedules)[0]

    return run


def step_graph(name: GraphName) -> Engine:
    module = FusedStep(AlignModule(), UNetModule(), timed=False)
    names = ("z", "stored", "history", "index", "plan", "lambdas", "caption_embedding")
    names += ("label_embeddings", "regions", "region_mask", "text_context", "grounding_context")
    outputs = ("next_z", "next_stored", "next_history", "next_index", "loss_global", "loss_local")
    taken = names if name == "step_grounded" else names[:-1]
    return Function(
        lambda given: dict(zip(outputs, module(*(given[n] for n in taken)), strict=True))
    )


STEPS: dict[GraphName, Engine] = {n: step_graph(n) for n in ("step_grounded", "step_plain")}


def operator(schedules: Sequence[Schedule], z: Tensor) -> Tensor:
    """The registered op on a CPU, in float64 here."""
    plan = torch.stack([schedule.plan for schedule in schedules])
    state = [z.double(), torch.zeros_like(z.double())]
    state.append(torch.zeros(len(z), HISTORY, *SHAPE, dtype=torch.float64))
    step = torch.zeros(len(z), dtype=torch.int64)
    images = torch.arange(len(z))
    for _ in range(max(len(schedule.table) for schedule in schedules)):
        row = plan[images, step]
        state[0].copy_(align(state[0], row[:, 1]))
        halves = (predict(state[0], row[:, 0], half) for half in (0, 1))
        denoise_update_(*state, *halves, None, None, plan, step)
        step += 1
    return state[0]


EXECUTORS: dict[str, tuple[Executor, float]] = {
    "op": (operator, 1e-9),
    "eager": (eager, 1e-4),
    "captured-step": (captured("step"), 1e-4),
    "captured-trajectory": (captured("trajectory"), 1e-4),
    "exported": (captured("step", step_graphs=True), 1e-4),
}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_step_is_that_of_diffusers_schedulers(executor: str) -> None:
    """Images of one batch with solvers, lengths, rates and guidance of their own."""
    run, tolerance = EXECUTORS[executor]
    mixed = [
        ("plms", make_schedule("plms", 12)),
        ("dpmpp_2m", make_schedule("dpmpp_2m", 8, eta0=0.2, guidance=5.0)),
        ("ddim", make_schedule("ddim", 5, guidance=2.0)),
        ("plms", make_schedule("plms", 2)),
    ]
    batches = [mixed, *([(name, make_schedule(name, 20))] for name in SOLVERS)]
    for batch in batches:
        z = torch.stack([start(i) for i in range(len(batch))]).float()
        found = run([schedule for _, schedule in batch], z)
        for i, (solver, schedule) in enumerate(batch):
            truth = expected(solver, schedule, i)[-1]
            error = float((found[i].double() - truth).norm() / truth.norm())
            assert error < tolerance, (solver, len(batch))


def test_executors_agree_to_the_bit() -> None:
    schedules = [make_schedule("plms", 9), make_schedule("plms", 4, guidance=6.0)]
    z = torch.stack([start(0), start(1)]).float()
    truth = eager(schedules, z)
    for name in ("captured-step", "captured-trajectory", "exported"):
        assert torch.equal(EXECUTORS[name][0](schedules, z), truth), name


def test_images_of_a_step_graph_may_stand_at_different_evaluations() -> None:
    """A batch whose second image is two evaluations ahead ends where each would alone."""
    schedules = [make_schedule("plms", 5), make_schedule("dpmpp_2m", 4)]
    z = torch.stack([start(0), start(1)]).float()
    state = {
        "z": z,
        "stored": torch.zeros_like(z),
        "history": torch.zeros(2, HISTORY, *SHAPE),
        "index": torch.zeros(2, dtype=torch.int64),
    }
    fixed = {
        **conditioning(2).by_image(),
        "plan": torch.stack([schedule.plan for schedule in schedules]).float(),
        "lambdas": torch.ones(2, 2),
    }
    engine = STEPS["step_grounded"]

    def run(images: slice) -> None:
        rows = {name: value[images] for name, value in {**fixed, **state}.items()}
        found = engine(rows)
        for name, value in state.items():
            value[images] = found[f"next_{name}"]

    for _ in range(2):
        run(slice(1, 2))
    for _ in range(8):
        run(slice(0, 2))
    # past its end an image stays as it is
    assert state["index"].tolist() == [8, 10]
    for i, (name, schedule) in enumerate(zip(("plms", "dpmpp_2m"), schedules, strict=True)):
        truth = expected(name, schedule, i)[-1]
        assert float((state["z"][i].double() - truth).norm() / truth.norm()) < 1e-4
