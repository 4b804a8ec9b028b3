"""Products of views become products of what is viewed, with the same values and fewer nodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from hcma_fast.export.onnx.merge_products import unflatten_products

_aten = torch.ops.aten


def _trace(function: Callable[..., Tensor], *example: Tensor) -> fx.GraphModule:
    traced: fx.GraphModule = make_fx(function, tracing_mode="symbolic")(*example)
    return traced


def _count(traced: fx.GraphModule, *targets: object) -> int:
    return sum(node.target in targets for node in traced.graph.nodes)


def _linear_gradient(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.gelu(F.linear(leaf, weight, bias)).sum(), leaf)
    return gradient


def _attention_gradient(x: Tensor, other: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    mixed = (leaf @ other.transpose(-1, -2)).softmax(-1) @ other
    (gradient,) = torch.autograd.grad((mixed * mixed).sum(), leaf)
    return gradient


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("case", ["linear", "attention"])
def test_same_values_without_flat_products(case: str, batch: int) -> None:
    torch.manual_seed(0)
    if case == "linear":
        function: Callable[..., Tensor] = _linear_gradient
        fixed = (torch.randn(6, 5), torch.randn(6))
        shape: tuple[int, ...] = (7, 5)
    else:
        function, fixed, shape = _attention_gradient, (), (2, 7, 5)
    example = [torch.randn(3, *shape), *(fixed or [torch.randn(3, *shape)])]
    traced = _trace(function, *example)
    flat = _count(traced, _aten.mm.default, _aten.addmm.default, _aten.bmm.default)
    assert flat >= 2
    rewritten = unflatten_products(_trace(function, *example))
    assert _count(rewritten, _aten.mm.default, _aten.addmm.default, _aten.bmm.default) == 0
    assert _count(rewritten, _aten.matmul.default) == flat
    assert _count(rewritten, _aten.view.default, _aten._unsafe_view.default) == 0
    x = torch.randn(batch, *shape)
    given = fixed or (torch.randn(batch, *shape),)
    torch.testing.assert_close(rewritten(x, *given), function(x, *given))


def test_a_product_of_matrices_and_a_view_that_cuts_columns_stay() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        # (B, 4, 6) as (B 2, 12): not a merge of leading dimensions
        return torch.mm(x.view(-1, 12), weight) + torch.mm(weight, weight[:, :1]).sum()

    example = (torch.randn(2, 4, 6), torch.randn(12, 12))
    rewritten = unflatten_products(_trace(function, *example))
    assert _count(rewritten, _aten.mm.default) == 2
    torch.testing.assert_close(rewritten(*example), function(*example))
