"""Both updates, and the bytes of every kernel, in Triton's interpreter; see test_interpreter.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter_rules import DTYPES, EXAMPLES, check, double, rows_of
from step_contract import align, expected, make_schedule, predict
from step_contract import start as contract_start
from torch import Tensor
from triton.runtime import interpreter

from hcma_fast.bench.estimates.kernel_resources import CASES
from hcma_fast.bench.speed.harness.rounds import relative_error
from hcma_fast.bench.speed.suites.kernel_times import ERRORS, KERNELS, TORCH, TRITON, load_kernel
from hcma_fast.kernels.align_update import (
    align_update_cuda,
    align_update_in_place_cuda,
    align_update_reference,
)
from hcma_fast.kernels.denoise_update import denoise_update_cuda, denoise_update_reference
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import HISTORY, PLAN_COLUMNS, Column


def predictions(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)] for _ in range(count)
    ]


def plans(*schedules: Schedule) -> Tensor:
    """(B, PLAN_ROWS, PLAN_COLUMNS) float64."""
    return torch.stack([schedule.plan for schedule in schedules])


@pytest.mark.parametrize(
    ("dtype", "latent_dtype", "guided"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float32, False),
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float16, True),
        (torch.bfloat16, torch.bfloat16, True),
    ],
)
def test_denoise_update_over_all_evaluations(
    dtype: torch.dtype, latent_dtype: torch.dtype, guided: bool
) -> None:
    """Per image: another solver and length of the trajectory, and another guidance scale."""
    plan = plans(
        make_schedule("plms", 20, guidance=7.5),
        make_schedule("dpmpp_2m", 8),
        make_schedule("ddim", 20),
    )
    shape = (3, 3, 5, 7)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(latent_dtype)
    history = torch.zeros(3, HISTORY, *shape[1:], dtype=latent_dtype)
    kernel = [start.clone(), torch.zeros_like(start), history]
    peer: tuple[Tensor, ...] = tuple(v.clone() for v in kernel)
    exact: tuple[Tensor, ...] = tuple(double(kernel))
    # the images are at evaluations of their own
    step = torch.tensor([0, 0, 0])
    for k, (first, second) in enumerate(predictions(shape, dtype, 22)):
        eps = (first if guided else None, second)
        wide = tuple(None if e is None else e.double() for e in eps)
        denoise_update_cuda(*kernel, *eps, None, None, plan.float(), step)
        peer = denoise_update_reference(*peer, *eps, None, None, plan.float(), step)
        exact = denoise_update_reference(*exact, *wide, None, None, plan, step)
        check(kernel[:2], peer[:2], exact[:2])
        step += 1 if k % 5 else torch.tensor([1, 0, 1])


def test_the_kernel_is_held_to_the_contract_of_a_step() -> None:
    """As tests/sampling/test_step_contract.py holds all other executors to it."""
    batch = [
        ("plms", make_schedule("plms", 12)),
        ("dpmpp_2m", make_schedule("dpmpp_2m", 8, eta0=0.2, guidance=5.0)),
        ("ddim", make_schedule("ddim", 5, guidance=2.0)),
    ]
    plan, step = plans(*(schedule for _, schedule in batch)).float(), torch.zeros(3).long()
    state = [torch.stack([contract_start(i) for i in range(3)]).float()]
    state += [torch.zeros_like(state[0]), torch.zeros(3, HISTORY, *state[0].shape[1:])]
    for _ in range(13):
        row = plan[torch.arange(3), step]
        state[0].copy_(align(state[0], row[:, Column.ETA]))
        halves = [predict(state[0], row[:, Column.TIMESTEP], half) for half in (0, 1)]
        denoise_update_cuda(*state, *halves, None, None, plan, step)
        step += 1
    for i, (solver, schedule) in enumerate(batch):
        truth = expected(solver, schedule, i)[-1]
        assert float((state[0][i].double() - truth).norm() / truth.norm()) < 1e-4


def check_denoise(shape: tuple[int, ...], dtype: torch.dtype, guided: bool, seed: int = 5) -> None:
    """One evaluation, from a state and a plan drawn at random: every column counts."""
    generator = torch.Generator().manual_seed(seed)
    z, stored, move, noise, *ring = (torch.randn(shape, generator=generator) for _ in range(7))
    state = [z, stored, torch.stack(ring, 1)]
    (eps,) = predictions(shape, dtype, 1)
    plan = torch.randn(shape[0], 4, PLAN_COLUMNS, generator=generator).double()
    plan[..., Column.PUSHES] = torch.randint(2, (4,), generator=generator)
    plan[..., Column.ACTIVE] = torch.randint(2, (4,), generator=generator)
    step = torch.randint(4, (shape[0],), generator=generator)
    given = (eps[0] if guided else None, eps[1], move, noise)
    wide = tuple(None if e is None else e.double() for e in given)
    peer = denoise_update_reference(*(v.clone() for v in state), *given, plan.float(), step)
    exact = denoise_update_reference(*double(state), *wide, plan, step)
    denoise_update_cuda(*state, *given, plan.float(), step)
    check(state, peer, exact)


# a program has 1024 elements: one, some of one, whole ones, and a rest
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 9, 7), (2, 4, 64, 64), (2, 4, 72, 61)])
def test_denoise_update_over_several_programs(shape: tuple[int, ...]) -> None:
    for seed in range(4):
        check_denoise(shape, torch.float16, guided=True, seed=seed)


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 50), st.booleans())
def test_denoise_update_shapes(
    batch: int, height: int, width: int, seed: int, guided: bool
) -> None:
    check_denoise((batch, 4, height, width), DTYPES[height % 3], guided, seed)


@pytest.mark.parametrize("step", [-1, 6, 1001, 10**12])
def test_updates_outside_the_table_change_nothing(step: int) -> None:
    plan, counter = plans(make_schedule("plms", 5)).float(), torch.tensor([step])
    targets = [torch.randn(1, 4, 9), torch.randn(1, 4, 9), torch.randn(1, HISTORY, 4, 9)]
    before = [target.clone() for target in targets]
    eps = torch.full((1, 4, 9), torch.nan)
    denoise_update_cuda(*targets, eps, eps, None, None, plan, counter)
    rates = torch.ones(1, 6)
    align_update_in_place_cuda(targets[0], torch.ones(1, 4, 9), rates, counter, False)
    for target, truth in zip(targets, before, strict=True):
        assert torch.equal(target, truth)


def align_by_torch(
    z: Tensor, gradient: Tensor, table: Tensor, step: Tensor, normalized: bool
) -> Tensor:
    """As AlignStep writes it."""
    rate = table[torch.arange(len(z)), step].view(-1, 1, 1, 1).to(z.dtype)
    if normalized:
        norms = [
            (v * v).sum((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt() for v in (z, gradient)
        ]
        rate = rate * norms[0] / norms[1]
    return z - rate * gradient


def check_align(
    shape: tuple[int, ...], dtype: torch.dtype, normalized: bool, scale: float = 1.0
) -> None:
    generator = torch.Generator().manual_seed(3)
    z, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    z, gradient = z.to(dtype), (scale * gradient).to(dtype)
    table = torch.rand(shape[0], 5, generator=generator)
    step = torch.randint(5, (shape[0],), generator=generator)
    found = align_update_cuda(z, gradient, table, step, normalized)
    same = align_by_torch(z, gradient, table, step, normalized)
    exact = align_by_torch(*double((z, gradient, table)), step, normalized)
    check([found], [same], [exact])
    reference = align_update_reference(*double((z, gradient, table)), step, normalized)
    torch.testing.assert_close(reference, exact)
    align_update_in_place_cuda(z, gradient, table, step, normalized)
    assert torch.equal(z, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [False, True])
# the last one is too large to be held between the norms and the update
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 9, 7), (2, 4, 64, 64), (2, 4, 72, 61)])
def test_align_update(shape: tuple[int, ...], normalized: bool, dtype: torch.dtype) -> None:
    check_align(shape, dtype, normalized)


@pytest.mark.parametrize("normalized", [False, True])
def test_align_update_without_a_gradient(normalized: bool) -> None:
    check_align((2, 4, 5, 3), torch.float32, normalized, scale=0.0)


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_align_update_shapes(batch: int, height: int, width: int, normalized: bool) -> None:
    check_align((batch, 4, height, width), DTYPES[height % 3], normalized)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_are_independent(dtype: torch.dtype) -> None:
    latents, table = [torch.randn(3, 4, 6, 5).to(dtype) for _ in range(5)], torch.rand(3, 4)
    step = torch.tensor([3, 0, 1])
    for normalized in (False, True):
        rows_of(lambda *v, n=normalized: align_update_cuda(*v, n), [*latents[:2], table, step])
    rows = plans(*(make_schedule("plms", 10, guidance=scale) for scale in (1, 3, 7.5))).float()

    def denoise(*values: Tensor) -> tuple[Tensor, ...]:
        targets = [values[0].clone(), values[4].clone(), torch.stack(values[:3], 1)]
        denoise_update_cuda(*targets, values[3], values[4], None, None, *values[5:])
        return tuple(targets)

    rows_of(denoise, [*latents, rows, torch.tensor([0, 1, 9])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernel", CASES)
def test_bytes_of_the_offline_table_are_those_that_the_kernel_asks_for(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the interpreter loads and stores, masks considered."""
    launch, traffic = CASES[kernel](dtype, 2)

    def data(name: str, tensor: Tensor) -> Tensor:
        if name == "step":
            return torch.full(tensor.shape, 5)
        if name == "plan":
            return plans(make_schedule("plms", 50)).float()
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    arguments = {
        name: data(name, value) if isinstance(value, Tensor) else value
        for name, value in launch.arguments.items()
    }
    asked = 0
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted(ptrs, mask):  # type: ignore[no-untyped-def]
        nonlocal asked
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        asked += int(np.broadcast_to(mask.data, ptrs.data.shape).sum()) * size

    def counting_load(self, ptrs, mask, *rest):  # type: ignore[no-untyped-def]
        counted(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):  # type: ignore[no-untyped-def]
        counted(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    replace(launch, arguments=arguments).run()
    assert asked == traffic.moved


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_timed_suite_compares_a_kernel_with_its_reference(kernel: str, dtype: str) -> None:
    found, expected = (load_kernel(kernel, dtype, kind, 1, "cpu") for kind in (TRITON, TORCH))
    assert relative_error(found.generate(), expected.generate()) <= ERRORS[dtype]
