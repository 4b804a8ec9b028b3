"""Cosine loss and region pooling under Triton's interpreter; run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter_rules import DTYPES, EXAMPLES, check, double, rows_of
from torch import Tensor

from hcma_fast.kernels.cosine_loss import cosine_loss_cuda, cosine_loss_reference
from hcma_fast.kernels.region_pool import (
    region_pool_backward_cuda,
    region_pool_backward_reference,
    region_pool_cuda,
    region_pool_reference,
)
from hcma_fast.losses import global_loss, local_loss, local_mean


def features(
    batch: int, boxes: int, width: int, dtype: torch.dtype, mask: Tensor | None = None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if mask is None:
        mask = (torch.rand(batch, boxes, generator=generator) > 0.4).float()
    lambdas = torch.rand(batch, 2, generator=generator) + 0.5
    pair = [normal(batch, width), normal(batch, width)]
    return [*pair, normal(batch, boxes, width), normal(batch, boxes, width), mask, lambdas]


def losses_by_autograd(
    f_global: Tensor,
    caption: Tensor,
    f_local: Tensor,
    labels: Tensor,
    mask: Tensor,
    lambdas: Tensor,
) -> list[Tensor]:
    """As AlignStep writes it: the losses of losses.py, and autograd."""
    f_global, f_local = (f.detach().requires_grad_() for f in (f_global, f_local))
    loss_global, loss_local = global_loss(f_global, caption), local_loss(f_local, labels, mask)
    objective = lambdas[..., 0] * loss_global + lambdas[..., 1] * local_mean(loss_local, mask)
    gradients = torch.autograd.grad(objective.sum(), (f_global, f_local))
    return [v.detach() for v in (objective, loss_global, loss_local, *gradients)]


def check_cosine(inputs: list[Tensor]) -> None:
    exact = losses_by_autograd(*double(inputs))
    # a loss is 1 - cos, and a slope the difference of two vectors about as long as this one
    vectors = zip(double(inputs[1:4:2]), double(inputs[:3:2]), strict=True)
    slopes = [
        float(
            (
                torch.nn.functional.normalize(b, dim=-1)
                / a.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            )
            .abs()
            .max()
        )
        for b, a in vectors
    ]
    sizes = [2.0, 1.0, 1.0, *slopes]
    check(cosine_loss_cuda(*inputs), losses_by_autograd(*inputs), exact, sizes)
    check(cosine_loss_reference(*double(inputs)), exact, exact, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 30, 768), (3, 5, 100), (2, 17, 33)])
def test_cosine_loss(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_cosine(features(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("valid", [0.0, 1.0])
def test_cosine_loss_with_a_mask_that_is_empty_or_full(valid: float, dtype: torch.dtype) -> None:
    inputs = features(2, 7, 48, dtype, torch.full((2, 7), valid))
    check_cosine(inputs)
    grad_local = cosine_loss_cuda(*inputs)[-1]
    assert bool(grad_local.any()) == bool(valid)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float16, torch.int64])
def test_cosine_loss_takes_any_mask_and_shared_lambdas(mask_dtype: torch.dtype) -> None:
    inputs = features(3, 6, 40, torch.float32)
    inputs[5] = torch.tensor([0.3, 1.7])
    expected = cosine_loss_cuda(*inputs)
    inputs[4] = inputs[4].to(mask_dtype)
    for value, truth in zip(cosine_loss_cuda(*inputs), expected, strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosine_loss_of_zero_vectors(dtype: torch.dtype) -> None:
    inputs = features(2, 4, 24, dtype, torch.ones(2, 4))
    for tensor in inputs[:2]:
        tensor[0] = 0
    for tensor in inputs[2:4]:
        tensor[0, 1], tensor[1, 2] = 0, 0
    inputs[3][0, 3] = 0
    # not zero, and below the floor all the same
    inputs[0][1] *= 1e-7
    inputs[2][1, 0] *= 1e-7
    check_cosine(inputs)
    assert cosine_loss_cuda(*inputs)[1][0] == 1


def test_cosine_loss_of_zero_vectors_stays_finite_in_float16() -> None:
    # the true slope, about 1e6, is beyond float16
    inputs = features(2, 4, 24, torch.float16, torch.ones(2, 4))
    inputs[0][0], inputs[2][1, 2] = 0, 0
    found = cosine_loss_cuda(*inputs)
    exact = [v.clamp(-65504, 65504) for v in losses_by_autograd(*double(inputs))]
    check(found, cosine_loss_reference(*inputs), exact)


def test_cosine_loss_does_not_read_masked_boxes_and_hides_no_nan() -> None:
    inputs = features(2, 4, 24, torch.float16, torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]]))
    clean = cosine_loss_cuda(*inputs)
    inputs[2][0, 1], inputs[3][1, 0] = torch.nan, torch.inf
    for value, truth in zip(cosine_loss_cuda(*inputs), clean, strict=True):
        assert torch.equal(value, truth)
    for value, truth in zip(cosine_loss_reference(*inputs), cosine_loss_cuda(*inputs), strict=True):
        torch.testing.assert_close(value, truth, rtol=2e-3, atol=1e-5)
    inputs[0][0, 3] = torch.nan
    objective, loss_global, _, grad_global, _ = cosine_loss_cuda(*inputs)
    for value in (objective, loss_global, grad_global):
        assert value[0].isnan().all() and value[1].isfinite().all()


@EXAMPLES
@given(st.integers(1, 4), st.integers(1, 33), st.integers(1, 300), st.sampled_from(DTYPES))
def test_cosine_loss_shapes(batch: int, boxes: int, width: int, dtype: torch.dtype) -> None:
    check_cosine(features(batch, boxes, width, dtype))


def regions_of(batch: int, boxes: int, cells: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(cells)
    regions = torch.rand(batch, boxes, cells, generator=generator)
    # most of a region map is 0, and here and there a whole box
    regions = regions * (torch.rand(regions.shape, generator=generator) > 0.7)
    regions[0, boxes // 2] = 0
    return regions.to(dtype)


def pool_by_torch(local: Tensor, regions: Tensor) -> Tensor:
    """As RegionHead writes it."""
    total = regions.sum(-1, keepdim=True)
    return (regions / torch.where(total > 0, total, torch.ones_like(total))) @ local


def check_pool(batch: int, boxes: int, cells: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    regions = regions_of(batch, boxes, cells, dtype)
    local = torch.randn(batch, cells, width, generator=generator).to(dtype)
    grad = torch.randn(batch, boxes, width, generator=generator).to(dtype)
    (pooled, total), leaves = region_pool_cuda(local, regions), (local, local.double())
    peer, exact = (pool_by_torch(v, regions.to(v.dtype)) for v in leaves)
    check([pooled, total], [peer, regions.sum(-1)], [exact, regions.double().sum(-1)])
    slopes = []
    for leaf in leaves:
        leaf.requires_grad_()
        out = pool_by_torch(leaf, regions.to(leaf.dtype))
        slopes += torch.autograd.grad(out, leaf, grad.to(leaf.dtype))
    check([region_pool_backward_cuda(grad, regions, total)], slopes[:1], slopes[1:])
    wide = double((local.detach(), regions, grad))
    reference = region_pool_reference(*wide[:2])
    torch.testing.assert_close(reference[0], exact.detach())
    slope = region_pool_backward_reference(wide[2], wide[1], reference[1])
    torch.testing.assert_close(slope, slopes[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 30, 256, 512), (2, 5, 49, 70), (1, 30, 1024, 40)]
)
def test_region_pool(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_pool(*shape, dtype)


@EXAMPLES
@given(st.integers(1, 2), st.integers(1, 32), st.integers(1, 100), st.integers(1, 300))
def test_region_pool_shapes(batch: int, boxes: int, cells: int, width: int) -> None:
    check_pool(batch, boxes, cells, width, DTYPES[(boxes + cells) % 3])


def test_region_pool_of_empty_boxes_is_zero() -> None:
    local, regions = torch.randn(2, 20, 8), torch.zeros(2, 3, 20)
    pooled, total = region_pool_cuda(local, regions)
    assert not pooled.any() and not total.any()
    assert not region_pool_backward_cuda(torch.randn(2, 3, 8), regions, total).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_are_independent(dtype: torch.dtype) -> None:
    rows_of(cosine_loss_cuda, features(3, 5, 40, dtype))
    regions, local = regions_of(3, 5, 30, dtype), torch.randn(3, 30, 20).to(dtype)
    rows_of(region_pool_cuda, [local, regions])
    rows_of(region_pool_backward_cuda, [torch.randn(3, 5, 20).to(dtype), regions, torch.rand(3, 5)])
