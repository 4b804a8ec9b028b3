"""Operations and bytes of an exported ONNX graph, counted without its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from hcma_fast.bench.estimates.counting import Counts, Operation, padded_width
from hcma_fast.errors import EngineError
from hcma_fast.specs import BATCH

Shape = tuple[int, ...]
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
#: only rename memory
_VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Constant"))
#: read some rows of their first input, as many bytes as they write
_GATHERS = frozenset(("Gather", "GatherND", "GatherElements", "Slice"))
#: compute products that no formula here counts; the exporter writes none
_UNKNOWN = frozenset(("Einsum", "ConvTranspose", "LSTM", "GRU", "RNN", "If", "Loop", "Scan"))
_NORMS = frozenset(("LayerNormalization", "InstanceNormalization", "GroupNormalization"))


def count_onnx(path: Path, batch: int) -> Counts:
    """One call of the graph in ``path`` at a batch size.

    Raises:
        EngineError: it has operators or shapes that cannot be counted.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {t.name: (_dtype(t.data_type), tuple(t.dims)) for t in graph.initializer}
    sizes: dict[str, tuple[str, Shape]] = dict(weights)
    # the exporter writes the shape of every tensor, with one symbolic size
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        sizes[value.name] = (_dtype(tensor.elem_type), _shape(tensor.shape, batch))

    def size_of(name: str) -> tuple[str, Shape]:
        if name not in sizes or min(sizes[name][1], default=1) < 1:
            raise _uncountable("the shape of a tensor is not known", f"{path.name}: {name}")
        return sizes[name]

    operations: list[Operation] = []
    used: set[str] = set()
    for node in graph.node:
        if node.op_type in _UNKNOWN or node.domain not in ("", "ai.onnx"):
            raise _uncountable("an operator cannot be counted", f"{path.name}: {node.op_type}")
        if node.op_type in _VIEWS:
            continue
        read, written = ([name for name in names if name] for names in (node.input, node.output))
        if node.op_type in _GATHERS:
            read = read[1:] + written[:1]
        used |= weights.keys() & set(read)
        moved = sum(_held(size_of(name)) for name in (*read, *written))
        flops = _flops(node, size_of)
        dtype = size_of(node.output[0])[0] if flops else "none"
        operations.append(Operation(flops, dtype, moved, **_besides(node, flops, size_of)))
    return Counts(
        operations=tuple(operations),
        weights_bytes=sum(_held(sizes[name]) for name in used),
        io_bytes=sum(_held(size_of(value.name)) for value in (*graph.input, *graph.output)),
    )


def _flops(node: onnx.NodeProto, size_of: Callable[[str], tuple[str, Shape]]) -> int:
    """A multiply and an add are two."""
    if node.op_type not in ("MatMul", "Gemm", "Conv", "Attention"):
        return 0
    shapes = [size_of(name)[1] for name in node.input if name]
    output = size_of(node.output[0])[1]
    attributes: dict[str, Any] = {
        a.name: onnx.helper.get_attribute_value(a) for a in node.attribute
    }
    if node.op_type == "MatMul":
        return 2 * math.prod(output) * shapes[0][-1]
    if node.op_type == "Gemm":
        return 2 * math.prod(output) * shapes[0][0 if attributes.get("transA") else 1]
    if node.op_type == "Conv":
        # the weight is (output channels, input channels of a group, kernel ...)
        return 2 * math.prod(output) * math.prod(shapes[1][1:])
    query, key, value = shapes[:3]
    # (B, T, H D) or (B, H, T, D): heads and widths are what is not batch and length
    heads = math.prod(query[1:-2])
    return 2 * query[0] * heads * query[-2] * key[-2] * (query[-1] + value[-1])


def _besides(
    node: onnx.NodeProto, flops: int, size_of: Callable[[str], tuple[str, Shape]]
) -> dict[str, int]:
    """Padding, exponentials and normalised values, see :class:`.counting.Operation`."""
    if node.op_type == "Softmax":
        return {"exponentials": math.prod(size_of(node.output[0])[1])}
    if node.op_type in _NORMS:
        return {"normalised": math.prod(size_of(node.output[0])[1])}
    if node.op_type != "Attention":
        return {}
    query, key = (size_of(name)[1] for name in node.input[:2])
    heads = {a.name: a.i for a in node.attribute}.get("q_num_heads", 0)
    width = query[-1] // heads if len(query) == 3 else query[-1]
    scores = math.prod(query) // width * key[-2]
    return {"padding_flops": flops * padded_width(width) // width - flops, "exponentials": scores}


def _held(size: tuple[str, Shape]) -> int:
    return _BYTES[size[0]] * math.prod(size[1])


def _dtype(element: int) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(element))


def _shape(shape: onnx.TensorShapeProto, batch: int) -> Shape:
    return tuple(batch if size.dim_param == BATCH else size.dim_value for size in shape.dim)


def _uncountable(problem: str, value: str) -> EngineError:
    return EngineError(
        f"this graph cannot be counted: {problem}",
        value=value,
        remedy="Give the checkpoint instead of the engine folder.",
    )
