"""The registered ops on the CPU: semantics, autograd, torch.func, compile, export, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from hcma_fast.config import AlignerConfig, AlignmentSettings
from hcma_fast.errors import UsageError
from hcma_fast.kernels import launch
from hcma_fast.kernels.align_update import (
    align_update,
    align_update_,
    align_update_cuda,
    align_update_in_place_op,
)
from hcma_fast.kernels.cosine_loss import cosine_loss, cosine_loss_cuda, cosine_loss_op
from hcma_fast.kernels.denoise_update import denoise_update_, denoise_update_op
from hcma_fast.kernels.region_pool import (
    region_pool,
    region_pool_backward_op,
    region_pool_cuda,
    region_pool_op,
)
from hcma_fast.kernels.update_sums import columns_of, denoise_update_rows, update_of
from hcma_fast.losses import global_loss, local_loss, local_mean
from hcma_fast.models.heads import RegionHead
from hcma_fast.sampling.batch_kind import used_columns
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.sampling.solvers import ddim, dpmpp_2m, plms
from hcma_fast.specs import HISTORY

DOUBLE = torch.float64


def normal(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_inputs(dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """One image has no box; f^G and f^L first and third."""
    mask = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=dtype)
    pair = [normal(3, 10, dtype=dtype, seed=1), normal(3, 10, dtype=dtype, seed=2)]
    boxes = [normal(3, 4, 10, dtype=dtype, seed=seed) for seed in (3, 4)]
    return [*pair, *boxes, mask, torch.tensor([0.7, 1.3], dtype=dtype)]


def objective(f_global: Tensor, f_local: Tensor, fixed: list[Tensor]) -> Tensor:
    """As AlignStep has it."""
    _, caption, _, labels, mask, lambdas = fixed
    local = local_mean(local_loss(f_local, labels, mask), mask)
    return lambdas[0] * global_loss(f_global, caption) + lambdas[1] * local


def pool_inputs(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    regions = normal(2, 5, 9, dtype=dtype, seed=5).relu()
    regions[1, 2] = 0
    return normal(2, 9, 6, dtype=dtype), regions


def update_inputs(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = normal(3, 5, dtype=dtype, seed=7).abs()
    return normal(3, 2, 4, 3, dtype=dtype), normal(3, 2, 4, 3, dtype=dtype, seed=6), table, STEP


STEP = torch.tensor([4, 0, 2])


def denoise_inputs(dtype: torch.dtype = DOUBLE) -> list[Any]:
    tensors = [normal(2, 3, 4, dtype=dtype, seed=seed) for seed in range(4)]
    z, stored, *eps = tensors
    history = normal(2, HISTORY, 3, 4, dtype=dtype, seed=9)
    plan = Schedule.of(5, AlignmentSettings(guidance_scale=2)).plan.to(dtype)
    return [z, stored, history, *eps, None, None, plan[None], torch.tensor([3])]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_cosine_loss_is_that_of_the_align_step(dtype: torch.dtype) -> None:
    inputs = loss_inputs(dtype)
    leaves = [inputs[i].requires_grad_() for i in (0, 2)]
    expected = objective(leaves[0], leaves[1], inputs)
    slopes = torch.autograd.grad(expected.sum(), leaves)
    found, loss_global, loss_local, *gradients = cosine_loss(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss_global, global_loss(inputs[0], inputs[1]))
    torch.testing.assert_close(loss_local, local_loss(inputs[2], inputs[3], inputs[4]))
    torch.testing.assert_close(gradients, list(slopes))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaves), slopes)
    assert not loss_global.requires_grad and not gradients[0].requires_grad


def test_region_pool_is_that_of_the_region_head() -> None:
    head = RegionHead(AlignerConfig(latent_size=12, width=16, heads=2)).double()
    head.project = torch.nn.Sequential()
    local, regions = (value.requires_grad_() for value in pool_inputs())
    expected, found = head(local, regions), region_pool(local, regions)
    torch.testing.assert_close(found, expected)
    along = normal(2, 5, 6, seed=8)
    slopes = [torch.autograd.grad(out, (local, regions), along) for out in (found, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("normalized", [False, True])
def test_gradients_against_finite_differences(normalized: bool) -> None:
    inputs = loss_inputs()
    assert torch.autograd.gradcheck(
        lambda g, p: cosine_loss(g, inputs[1], p, *inputs[3:])[0],
        [inputs[i].requires_grad_() for i in (0, 2)],
    )
    local, regions = pool_inputs()
    regions += 0.1  # an empty box is a corner of the function
    assert torch.autograd.gradcheck(region_pool, (local.requires_grad_(), regions.requires_grad_()))
    z, gradient, table, step = update_inputs()
    leaves = (z.requires_grad_(), gradient.requires_grad_())
    assert torch.autograd.gradcheck(lambda *v: align_update(*v, table, step, normalized), leaves)


def test_align_update_below_the_floors_of_its_norms() -> None:
    z, gradient, table, step = update_inputs()
    gradient[0], z[1] = 0, 0
    leaves = (z.requires_grad_(), gradient.requires_grad_())
    found = align_update(*leaves, table, step, True)
    norms = [(v * v).sum((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt() for v in leaves]
    eta = table[torch.arange(3), step].view(3, 1, 1, 1)
    expected = z - eta * norms[0] / norms[1] * gradient
    torch.testing.assert_close(found, expected)
    along = normal(3, 2, 4, 3, seed=8)
    slopes = [torch.autograd.grad(out, leaves, along) for out in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_rows_beyond_a_schedule_change_nothing() -> None:
    targets, plan = denoise_inputs()[:3], denoise_inputs()[7]
    before = [target.clone() for target in targets]
    nothing = torch.full_like(targets[0], torch.nan)
    for step in (-1, 6, 1000, 1001):
        denoise_update_(*targets, nothing, nothing, None, None, plan, torch.tensor([step]))
        for target, truth in zip(targets, before, strict=True):
            assert torch.equal(target, truth)


def test_columns_that_are_neutral_everywhere_may_be_left_out() -> None:
    """For each solver, with the state and all inputs drawn at random."""
    z, stored, history, *eps = denoise_inputs()[:5]
    move = noise = torch.full_like(z, torch.nan)
    for solver in (plms, ddim, dpmpp_2m):
        schedule = Schedule.of(5, AlignmentSettings(guidance_scale=2), solver=solver)
        used = used_columns([schedule])
        for k in range(len(schedule.table)):
            columns = columns_of(schedule.plan[k : k + 1], z.dim())
            state = (z, stored, history.unbind(1), *eps)
            found = denoise_update_rows(*state, move, noise, update_of(columns, used[k]))
            every = denoise_update_rows(*state, None, None, update_of(columns))
            numbers = update_of(schedule.plan[k].tolist())
            shared = denoise_update_rows(*state, move, noise, numbers)
            for one, other, third in zip(found[:2], every[:2], shared[:2], strict=True):
                assert torch.equal(one, other)
                torch.testing.assert_close(third, one)
            for one, other, third in zip(found[2], every[2], shared[2], strict=True):
                assert torch.equal(one, other)
                torch.testing.assert_close(third, one)


def test_opcheck() -> None:
    # the one in which the outputs have more than one dtype
    dtype = torch.bfloat16
    inputs = loss_inputs(dtype)
    for index in (0, 2):
        inputs[index].requires_grad_()
    opcheck(cosine_loss_op, tuple(inputs))
    local, regions = pool_inputs(dtype)
    opcheck(region_pool_op, (local.requires_grad_(), regions.requires_grad_()))
    grad = normal(2, 5, 6, dtype=dtype)
    opcheck(region_pool_backward_op, (grad, regions.detach(), torch.ones(2, 5)))
    z, gradient, table, step = update_inputs(dtype)
    opcheck(align_update_in_place_op, (z, gradient, table, step, True))
    opcheck(align_update, (z.requires_grad_(), gradient.requires_grad_(), table, step, True))
    opcheck(denoise_update_op, tuple(denoise_inputs(dtype)))
    opcheck(denoise_update_op, (*denoise_inputs(dtype)[:3], None, *denoise_inputs(dtype)[4:]))


def by_func(features: Callable[[Tensor], tuple[Tensor, Tensor]], fixed: list[Tensor]) -> Any:
    def total(z: Tensor) -> Tensor:
        f_global, f_local = features(z)
        return cosine_loss(f_global, fixed[1], f_local, *fixed[3:])[0].sum()

    return torch.func.grad(total)


def by_pullback(features: Callable[[Tensor], tuple[Tensor, Tensor]], fixed: list[Tensor]) -> Any:
    """The kernel's own gradients, fed to the features' backward pass."""

    def gradient(z: Tensor) -> Tensor:
        (f_global, f_local), pull = torch.func.vjp(features, z)
        *_, grad_global, grad_local = cosine_loss(f_global, fixed[1], f_local, *fixed[3:])
        return pull((grad_global, grad_local))[0]  # type: ignore[no-any-return]

    return gradient


@pytest.mark.parametrize("build", [by_func, by_pullback])
@pytest.mark.parametrize("how", ["eager", "make_fx", "compile"])
def test_gradient_through_torch_func(build: Callable[..., Any], how: str) -> None:
    local, regions = pool_inputs()
    fixed = [value[:2] for value in loss_inputs()[:5]] + loss_inputs()[5:]
    weight = normal(6, 10, seed=11)

    def features(z: Tensor) -> tuple[Tensor, Tensor]:
        pooled = region_pool(torch.tanh(z), regions) @ weight
        return pooled[:, 0], pooled[:, 1:]

    def reference(z: Tensor) -> Tensor:
        total = regions.sum(-1, keepdim=True)
        weights = regions / torch.where(total > 0, total, torch.ones_like(total))
        pooled = weights @ torch.tanh(z) @ weight
        return objective(pooled[:, 0], pooled[:, 1:], fixed).sum()

    leaf = local.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference(leaf), leaf)
    gradient = build(features, fixed)
    if how == "make_fx":
        graph = make_fx(gradient)(local)
        targets = {str(node.target) for node in graph.graph.nodes}
        assert {f"hcma_fast.{op}.default" for op in ("cosine_loss", "region_pool")} <= targets
        gradient = graph
    elif how == "compile":
        gradient = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(local), expected)


def _updated(z: Tensor, gradient: Tensor, table: Tensor, step: Tensor) -> Tensor:
    return align_update(z, gradient, table, step, False)  # type: ignore[no-any-return]


def _drawn(op: str, batch: int) -> list[Tensor]:
    seeds = range(batch, batch + 4)
    if op == "align_update":
        latents = [normal(batch, 2, 4, 3, seed=seed) for seed in seeds[:2]]
        return [*latents, update_inputs()[2][:1], STEP[:1]]
    if op == "region_pool":
        return [normal(batch, 9, 6, seed=seeds[0]), normal(batch, 5, 9, seed=seeds[1]).relu()]
    texts = [normal(batch, 10, seed=seed) for seed in seeds[:2]]
    boxes = [normal(batch, 4, 10, seed=seed) for seed in seeds[2:]]
    return [*texts, *boxes, torch.ones(batch, 4, dtype=DOUBLE), torch.tensor([0.7, 1.3])]


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("align_update", _updated),
        ("region_pool", region_pool_op),
        ("cosine_loss", cosine_loss_op),
    ],
)
def test_export_keeps_the_ops_and_a_free_batch(op: str, function: Callable[..., Any]) -> None:
    class Step(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return function(*inputs)

    batch = torch.export.Dim("batch", max=64)
    few, many = _drawn(op, 3), _drawn(op, 5)
    pairs = zip(few, many, strict=True)
    free = [{0: batch} if len(one) != len(other) else None for one, other in pairs]
    program = torch.export.export(Step(), tuple(few), dynamic_shapes=(tuple(free),))
    assert any(f"hcma_fast.{op}" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*many), Step()(*many))


def test_compiled_updates_write_in_place() -> None:
    def step(z: Tensor, stored: Tensor, history: Tensor, *rest: Any) -> Tensor:
        denoise_update_(z, stored, history, *rest)
        align_update_(z, rest[0], rest[4][..., 5], rest[5], True)
        return z + 0

    eager, compiled = denoise_inputs(), denoise_inputs()
    expected = step(*eager)
    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(*compiled), expected)
    torch.testing.assert_close(compiled, eager)


def test_an_in_place_update_has_no_gradient_and_says_so() -> None:
    z, gradient, table, step = update_inputs()
    inputs = denoise_inputs()
    inputs[4].requires_grad_()
    moved = z.requires_grad_() * 1
    with pytest.raises(UsageError, match="no gradient"):
        align_update_(moved, gradient, table, step, False)
    with pytest.raises(UsageError, match="no gradient"):
        denoise_update_(*inputs)
    with torch.no_grad():
        denoise_update_(*inputs)


def test_targets_must_be_contiguous() -> None:
    z, gradient, table, step = update_inputs()
    with pytest.raises(UsageError, match="contiguous"):
        align_update_(z.transpose(2, 3), gradient.transpose(2, 3), table, step, False)
    inputs = denoise_inputs()
    inputs[2] = inputs[2].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(UsageError, match="history"):
        denoise_update_(*inputs)


def test_limits_of_the_kernels_are_typed() -> None:
    wide = [
        torch.ones(1, 8193),
        torch.ones(1, 8193),
        torch.ones(1, 1, 8193),
        torch.ones(1, 1, 8193),
    ]
    with pytest.raises(UsageError, match="8192"):
        cosine_loss_cuda(*wide, torch.ones(1, 1), torch.ones(2))
    with pytest.raises(UsageError, match="32 boxes"):
        region_pool_cuda(torch.ones(1, 4, 4), torch.ones(1, 33, 4))
    if launch.triton is not None:
        with pytest.raises(UsageError, match="float32"):
            align_update_cuda(*update_inputs(), False)


def test_without_triton_the_reference_works_and_a_launch_says_what_to_do() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from hcma_fast.errors import BackendError
from hcma_fast.kernels import align_update, cosine_loss, denoise_update, region_pool
z, table, step = torch.ones(1, 4, 2, 2), torch.full((1, 3), 0.5), torch.tensor([1])
assert torch.equal(align_update.align_update(z, z, table, step, False), z / 2)
try:
    align_update.align_update_cuda(z, z, table, step, False)
except BackendError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
