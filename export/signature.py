"""Whether a compiled graph has the inputs and outputs that its spec says."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from hcma_fast.errors import EngineError
from hcma_fast.specs import BATCH, BatchRange, IOSpec, TensorSpec

Tensors = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape (-1 for a size that varies) and dtype of each tensor by name, in the graph's order"""
_VARIES = -1
_ONNX_DTYPES = {"float": "float32"}


def check_signature(
    spec: IOSpec, inputs: Tensors, outputs: Tensors, *, ordered: bool = True
) -> None:
    """Whether a graph's inputs and outputs are those of the spec.

    Args:
        ordered: in the spec's order, too. TensorRT lists the tensors of an engine in its own.

    Raises:
        EngineError: a tensor too many, too few, or of another shape or dtype.
    """
    wrong = [
        *_differences(spec.inputs, inputs, spec.batch, ordered=ordered),
        *_differences(spec.outputs, outputs, spec.batch, ordered=ordered),
    ]
    if wrong:
        raise EngineError(
            f"the compiled graph {spec.graph} is not what its signature says",
            value="; ".join(wrong),
            remedy="Build it again: hcma-fast build --force.",
        )


def check_onnx_signature(spec: IOSpec, model: onnx.ModelProto) -> None:
    """:func:`check_signature` of an ONNX graph."""
    graph = model.graph
    # an input that has a value here is a default, and no engine asks for it
    valued = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in valued]
    check_signature(spec, dict(map(_described, inputs)), dict(map(_described, graph.output)))


def _differences(
    tensors: tuple[TensorSpec, ...], found: Tensors, batch: BatchRange, *, ordered: bool
) -> list[str]:
    expected = {tensor.name: tensor for tensor in tensors}
    wrong = [f"{name} is not in the signature" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif not _agrees(tensor, *found[name], batch):
            shape, dtype = found[name]
            wrong.append(f"{name} is {dtype} {shape}, not {tensor.dtype} {tensor.shape}")
    if ordered and not wrong and list(found) != list(expected):
        wrong.append(f"the order is {', '.join(found)}, not {', '.join(expected)}")
    return wrong


def _agrees(tensor: TensorSpec, shape: tuple[int, ...], dtype: str, batch: BatchRange) -> bool:
    fixed = batch.min if batch.static else None
    wanted = [fixed if size == BATCH else size for size in tensor.shape]
    if len(shape) != len(wanted) or dtype != tensor.dtype:
        return False
    return all(found in (_VARIES, size) for found, size in zip(shape, wanted, strict=True))


def _described(value: onnx.ValueInfoProto) -> tuple[str, tuple[tuple[int, ...], str]]:
    tensor = value.type.tensor_type
    sizes = tensor.shape.dim
    shape = tuple(size.dim_value if size.HasField("dim_value") else _VARIES for size in sizes)
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return value.name, (shape, _ONNX_DTYPES.get(dtype, dtype))
