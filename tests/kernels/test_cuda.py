"""The kernels on a real GPU, and replayed from a CUDA graph. Nobody has run these yet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcma_fast.config import AlignmentSettings
from hcma_fast.kernels.align_update import align_update, align_update_, align_update_reference
from hcma_fast.kernels.cosine_loss import cosine_loss, cosine_loss_reference
from hcma_fast.kernels.denoise_update import denoise_update_, denoise_update_reference
from hcma_fast.kernels.region_pool import region_pool, region_pool_reference
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import HISTORY

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to("cuda", dtype)


def close(found: Tensor, exact: Tensor) -> None:
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error <= TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_agree_with_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = [normal(3, 768, dtype=dtype), normal(3, 768, dtype=dtype)]
    features += [normal(3, 30, 768, dtype=dtype), normal(3, 30, 768, dtype=dtype)]
    fixed = [(torch.rand(3, 30) > 0.5).float().cuda(), torch.tensor([1.0, 0.7]).cuda()]
    exact = cosine_loss_reference(*[value.double() for value in (*features, *fixed)])
    for value, truth in zip(cosine_loss(*features, *fixed), exact, strict=True):
        close(value, truth)
    local, regions = normal(2, 256, 512, dtype=dtype), normal(2, 30, 256, dtype=dtype).relu()
    grad = normal(2, 30, 512, dtype=dtype)
    slopes = []
    for leaf in (local.clone().requires_grad_(), local.double().requires_grad_()):
        wide = regions.to(leaf.dtype)
        out = (
            region_pool(leaf, wide) if leaf.dtype == dtype else region_pool_reference(leaf, wide)[0]
        )
        slopes += [out.detach(), *torch.autograd.grad(out, leaf, grad.to(leaf.dtype))]
    close(slopes[0], slopes[2])
    close(slopes[1], slopes[3])
    for side in (64, 96):
        z, gradient = normal(2, 4, side, side, dtype=dtype), normal(2, 4, side, side, dtype=dtype)
        table, step = torch.rand(2, 51).cuda(), torch.tensor([7, 3]).cuda()
        for normalized in (False, True):
            inputs = (z.double(), gradient.double(), table.double(), step)
            found = align_update(z, gradient, table, step, normalized)
            close(found, align_update_reference(*inputs, normalized))


def test_one_captured_step_replays_over_the_trajectory() -> None:
    torch.manual_seed(0)
    schedule, shape = Schedule.of(50, AlignmentSettings()), (2, 4, 64, 64)
    rows, etas = schedule.plan[None].cuda(), torch.rand(1, len(schedule.table)).cuda()
    table, step = rows.float(), torch.zeros(1, dtype=torch.int64, device="cuda")
    z, stored = normal(*shape), normal(*shape)
    history = normal(shape[0], HISTORY, *shape[1:])
    eps, gradient = normal(2, *shape), normal(*shape)

    def advance() -> None:
        align_update_(z, gradient, etas, step, False)
        denoise_update_(z, stored, history, eps[0], eps[1], None, None, table, step)
        step.add_(1)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        advance()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    step.zero_()
    z.copy_(normal(*shape))
    exact = tuple(value.double() for value in (z, stored, history))
    for k in range(len(schedule.table)):
        eps.copy_(normal(2, *shape))
        gradient.copy_(normal(*shape))
        at = torch.tensor([k], device="cuda")
        moved = align_update_reference(exact[0], gradient.double(), etas.double(), at, False)
        wide = eps.double()
        exact = denoise_update_reference(moved, *exact[1:], wide[0], wide[1], None, None, rows, at)
        graph.replay()
        close(z, exact[0])
    assert int(step) == len(schedule.table)
