"""From a graph's module to something that torch.onnx.export can take, gradient included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from hcma_fast.config import TOKEN_LENGTH, AlignmentSettings
from hcma_fast.export.onnx.merge_products import unflatten_products
from hcma_fast.sampling.exported import FusedStep
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import BATCH, GraphName, IOSpec, TensorSpec

_aten = torch.ops.aten
#: operators of the backward pass that have no plain ONNX form
_DECOMPOSED = (
    _aten.gelu_backward,
    _aten.silu_backward,
    _aten.sigmoid_backward,
)


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax in float32. Safe means: rows that are masked out whole; the aligner masks nothing."""
    return torch.softmax(x.float(), dim).to(x.dtype)


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    grad, y = grad.float(), output.float()
    return (y * (grad - (grad * y).sum(dim, keepdim=True))).to(input_dtype)


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the last dimension: 9 nodes, where torch's own decomposition exports as 24."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * rstd * weight + bias, mean, rstd


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    needed: list[bool],
) -> tuple[Tensor, None, None]:
    """With respect to ``x`` alone, by means over the last dimension: fewer nodes than torch's."""
    normed, grad = (x - mean) * rstd, grad * weight
    across = (grad * normed).mean(-1, keepdim=True)
    return rstd * (grad - grad.mean(-1, keepdim=True) - normed * across), None, None


_OURS = {
    _aten._safe_softmax.default: _safe_softmax,
    _aten._softmax_backward_data.default: _softmax_backward,
    # LayerNormalization with three outputs is what TensorRT's parser refuses
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
}


#: a batch that no other size of a graph has: torch.export would tie equal sizes together
_EXAMPLE_BATCH = 3
#: From 64 on diffusers' Upsample2D makes its input contiguous, which means nothing in ONNX. A
#: range with both makes torch.export fail, and torch.onnx.export start again. Step graphs double
#: the batch.
_TRACED_BATCH = 31


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
        if tensor.name == "grounding_gate":
            return torch.rand(size, generator=generator)
        if tensor.name == "lambdas":
            return 0.5 + torch.rand(size, generator=generator)
        if tensor.name == "plan":
            plan = Schedule.of(50, AlignmentSettings()).plan.float()
            return plan.expand(size).contiguous()
        if tensor.name == "index":
            return torch.randint(0, 51, size, generator=generator)
        drawn = torch.randn(size, generator=generator)
        if tensor.name == "label_embeddings":
            # padding holds zeros, at which norms and their gradients are easily NaN
            drawn[:, boxes:] = 0
        return drawn

    return {tensor.name: draw(tensor) for tensor in spec.inputs}


def example_inputs(spec: IOSpec, vocabulary: int = 256) -> tuple[Tensor, ...]:
    """Inputs in call order to trace a graph with, of its one batch size, or of any."""
    size = spec.batch.min if spec.batch.static else _EXAMPLE_BATCH
    drawn = random_inputs(spec, size, torch.Generator().manual_seed(0), vocabulary)
    return tuple(drawn[name] for name in spec.input_names)


def dynamic_shapes(spec: IOSpec, most: int | None = None) -> tuple[Any, ...] | None:
    """For torch.export, per input: ``"batch"`` is one symbolic dimension; None if it is static.

    Args:
        most: the largest batch that the exporter is told of; by default one that any graph can be
            traced with.
    """
    if spec.batch.static:
        return None
    # with room for the example
    batch = torch.export.Dim(BATCH, min=1, max=max(most or _TRACED_BATCH, _EXAMPLE_BATCH))
    return tuple(
        {i: batch for i, size in enumerate(tensor.shape) if size == BATCH} or None
        for tensor in spec.inputs
    )


def traceable(name: GraphName, module: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """The module itself; what of it calls autograd is traced, forward and backward together."""
    if name == "align":
        return trace_gradient(module, example)
    if isinstance(module, FusedStep):
        z, _, _, _, _, lambdas, *fixed = example[:10]
        eta = z.new_zeros(len(z))
        times = (eta.long(),) if module.timed else ()
        align = trace_gradient(module.align, (z, *fixed, eta, lambdas, *times))
        return FusedStep(align, module.unet, timed=module.timed)
    return module


def trace_gradient(module: Callable[..., Any], example: tuple[Tensor, ...]) -> fx.GraphModule:
    """Trace ``module``, which calls autograd, with a symbolic batch, into operators ONNX knows."""
    with sdpa_kernel(SDPBackend.MATH):
        traced: fx.GraphModule = make_fx(
            module,
            decomposition_table=cast(Any, get_decompositions(_DECOMPOSED) | _OURS),
            tracing_mode="symbolic",
            _allow_non_fake_inputs=True,
        )(*example)
    return unflatten_products(traced)
