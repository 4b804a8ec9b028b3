"""From a graph's module to something that torch.onnx.export can take, gradient included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from hcma_fast.config import TOKEN_LENGTH
from hcma_fast.specs import BATCH, GraphName, IOSpec, TensorSpec

_aten = torch.ops.aten
#: operators of the backward pass (and LayerNorm's three outputs) that have no plain ONNX form
_DECOMPOSED = (
    _aten.native_layer_norm,
    _aten.native_layer_norm_backward,
    _aten.gelu_backward,
    _aten._softmax_backward_data,
    _aten.silu_backward,
    _aten.sigmoid_backward,
)


def random_inputs(
    spec: IOSpec, batch: int, generator: torch.Generator, vocabulary: int = 256, boxes: int = 3
) -> dict[str, Tensor]:
    """Inputs in each tensor's natural range; ``boxes`` of the 30 slots are valid, none if 0."""

    def shape(tensor: TensorSpec) -> tuple[int, ...]:
        return tuple(batch if size == BATCH else int(size) for size in tensor.shape)

    def draw(tensor: TensorSpec) -> Tensor:
        size = shape(tensor)
        if tensor.name == "input_ids":
            ids = torch.randint(0, vocabulary - 2, size, generator=generator)
            # CLIP pools at the end token, the last id of the vocabulary
            ids[:, 0], ids[:, TOKEN_LENGTH // 3 :] = vocabulary - 2, vocabulary - 1
            return ids
        if tensor.name == "timestep":
            return torch.randint(0, 1000, size, generator=generator)
        if tensor.name == "boxes":
            corners = torch.rand(size, generator=generator).unflatten(-1, (2, 2))
            return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)
        if tensor.name == "region_mask":
            return (torch.arange(size[-1]) < boxes).float().expand(size).contiguous()
        if tensor.name == "regions":
            valid = (torch.arange(size[1]) < boxes).float()[None, :, None]
            return torch.rand(size, generator=generator) * valid
        if tensor.name == "lambdas":
            return torch.tensor([1.0, 0.5])
        drawn = torch.randn(size, generator=generator)
        if tensor.name == "label_embeddings":
            # padding holds zeros, at which norms and their gradients are easily NaN
            drawn[:, boxes:] = 0
        return drawn

    return {tensor.name: draw(tensor) for tensor in spec.inputs}


def traceable(name: GraphName, module: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """The module itself; for `align`, its forward and backward traced into one plain graph."""
    if name != "align":
        return module
    return trace_gradient(module, example)


def trace_gradient(module: Callable[..., Any], example: tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace ``module``, which calls autograd, with a symbolic batch, into operators ONNX knows."""
    with sdpa_kernel(SDPBackend.MATH):
        traced: fx.GraphModule = make_fx(
            module,
            decomposition_table=cast(Any, get_decompositions(_DECOMPOSED)),
            tracing_mode="symbolic",
            _allow_non_fake_inputs=True,
        )(*example)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced
