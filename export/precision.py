"""A graph's module in half precision, with the parts that need it left in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcma_fast.errors import UsageError
from hcma_fast.specs import GraphName

Precision = Literal["float32", "float16", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Runs once per image, and holds what half precision is too coarse for: Fourier features of the
#: boxes and exact cell coverage.
_FLOAT32_GRAPHS = ("grounding",)


def check_precision(name: str | None) -> Precision:
    """``name`` as a precision; None is float32.

    Raises:
        UsageError: there is no such precision.
    """
    for precision in PRECISIONS:
        if name in (None, precision):
            return precision
    raise UsageError("unknown precision", value=name, remedy=f"Use one of {', '.join(PRECISIONS)}.")


def graph_precision(name: GraphName, precision: Precision) -> Precision:
    """What a graph computes in where ``precision`` is asked for."""
    return "float32" if name in _FLOAT32_GRAPHS else precision


def at_precision(
    name: GraphName,
    module: nn.Module,
    precision: Precision,
    halves: dict[int, nn.Parameter] | None = None,
) -> nn.Module:
    """``module`` itself for float32, else a copy with weights and products in half precision.

    Inputs and outputs stay float32, and inside the norms, softmax, cosine losses and the update
    of the latent. The models cast where they meet (``.to(weight.dtype)``).

    Args:
        halves: the converted weights so far, by the ``id`` of their originals, which must stay
            alive; new ones are added. Graphs that share weights then share the converted ones.
    """
    precision = graph_precision(name, precision)
    if precision == "float32":
        return module
    dtype = getattr(torch, precision)
    # weight by weight: a copy of the whole in float32 would be the most memory that a build takes
    halves = {} if halves is None else halves
    for weight in module.parameters():
        if id(weight) not in halves:
            half = weight.detach().to(dtype)
            halves[id(weight)] = nn.Parameter(half, requires_grad=weight.requires_grad)
    # deepcopy adds what else it copied to its memo
    converted = copy.deepcopy(module, dict(halves)).to(dtype)
    _restore_norms(converted)
    return converted


def _restore_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm | nn.GroupNorm):
            setattr(module, name, Float32Norm(child))
        else:
            _restore_norms(child)


class Float32Norm(nn.Module):
    """LayerNorm or GroupNorm that computes in float32; its few weights are kept in half precision.

    The libraries look at the dtype of such weights to know their own.
    """

    def __init__(self, norm: nn.LayerNorm | nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
        """0: a LayerNorm"""
        self.compute: Callable[..., Tensor] = (
            partial(F.group_norm, num_groups=norm.num_groups, eps=norm.eps)
            if isinstance(norm, nn.GroupNorm)
            else partial(F.layer_norm, normalized_shape=norm.normalized_shape, eps=norm.eps)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return self.compute(x.float(), weight=weight, bias=bias).to(x.dtype)
