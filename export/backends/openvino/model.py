"""OpenVINO models on the CPU, at the precision that was asked for; never a silent fallback."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor

from hcma_fast.errors import BackendError, DeviceMemoryError, EngineError
from hcma_fast.export.onnx.file import OnnxFile
from hcma_fast.export.precision import graph_precision
from hcma_fast.schedule import TRAIN_STEPS
from hcma_fast.specs import GraphName, IOSpec

OpenVINOPrecision = Literal["float32", "bfloat16"]
#: ours -> how a device lists it, how a compiled model reports it
_PRECISIONS = {"float32": ("FP32", "f32"), "bfloat16": ("BF16", "bf16")}


def openvino_version() -> str:
    """Version of the installed OpenVINO.

    Raises:
        BackendError: it is not installed.
    """
    return str(_openvino().__version__)


def computes(precision: OpenVINOPrecision) -> bool:
    """Whether this CPU has the instructions for it.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    return _PRECISIONS[precision][0] in shared_core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )


def precision_of(name: GraphName, precision: str) -> OpenVINOPrecision:
    """What a graph is opened in; ``precision`` is float32 or bfloat16 (``export.target``)."""
    halves = precision == graph_precision(name, "bfloat16") == "bfloat16"
    return "bfloat16" if halves else "float32"


def open_model(
    source: OnnxFile, *, precision: OpenVINOPrecision = "float32", threads: int | None = None
) -> Any:
    """An ``openvino.CompiledModel`` of an ONNX graph for all its batch sizes.

    Args:
        source: what it reads its weights from, as long as it is used: hold on to it.
        precision: of the products inside; inputs and outputs keep the file's dtypes.
        threads: default: all cores.

    Raises:
        BackendError: OpenVINO is missing, or would compute in another precision on this CPU.
        EngineError: the file cannot be read as a graph.
        DeviceMemoryError: the host has no memory left.
    """
    model = read_model(source, precision=precision)
    return compile_model(model, source.path, precision=precision, threads=threads)


def read_model(source: OnnxFile, *, precision: OpenVINOPrecision = "float32") -> Any:
    """The ``openvino.Model`` of an ONNX graph, fit to be compiled in ``precision``.

    Its weights are those of ``source``, where they lie in memory: hold on to it.

    Raises:
        BackendError: OpenVINO is missing, or this CPU lacks the precision.
        EngineError: the file cannot be read as a graph.
        DeviceMemoryError: the host has no memory left.
    """
    openvino = _openvino()
    if not computes(precision):
        raise _no_precision(precision)
    with _errors_named(source.path):
        model = _converted(openvino, source)
        _part_shared_weights(openvino, model)
        if precision == "bfloat16":
            look_up_sinusoids(openvino, model)
    return model


def _converted(openvino: Any, source: OnnxFile) -> Any:
    """The graph as OpenVINO has it, over the weights in memory.

    Its reader copies weights that it is given in memory. So it reads a graph that takes them as
    inputs, and these become constants that use the memory.
    """
    graph, weights = source.model(), source.arrays()
    kept = [tensor for tensor in graph.graph.initializer if tensor.name not in weights]
    inputs = [
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in graph.graph.initializer
        if tensor.name in weights
    ]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    graph.graph.input.extend(inputs)
    # by name: read_model would try every format that it knows on a file that is none
    frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    model = frontend.convert(frontend.load(io.BytesIO(graph.SerializeToString())))
    for parameter in model.get_parameters():
        name = parameter.get_friendly_name()
        if name in weights:
            shared = openvino.Tensor(weights[name], shared_memory=True)
            constant = openvino.op.Constant(shared, shared_memory=True)
            constant.set_friendly_name(name)
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    return model


def compile_model(
    model: Any,
    path: Path,
    *,
    precision: OpenVINOPrecision = "float32",
    threads: int | None = None,
    streams: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Any:
    """Compile what :func:`read_model` returned.

    Args:
        path: for messages.
        shapes: of the inputs, which ``model`` keeps; None leaves them as they are.
        threads: of all streams together; default: all cores.
        streams: requests that run side by side, each on its share of the threads.

    Raises:
        BackendError: OpenVINO would compute in another precision.
        EngineError: OpenVINO cannot compile it.
        DeviceMemoryError: the host has no memory left.
    """
    hint = _PRECISIONS[precision][1]
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": hint,
        **({"PERFORMANCE_HINT": "LATENCY"} if streams == 1 else {"NUM_STREAMS": streams}),
        **({} if threads is None else {"INFERENCE_NUM_THREADS": threads}),
    }
    with _errors_named(path):
        if shapes is not None:
            model.reshape(dict(shapes))
        compiled = shared_core().compile_model(model, "CPU", options)
    if compiled.get_property("INFERENCE_PRECISION_HINT").to_string() != hint:
        raise _no_precision(precision)
    return compiled


def weight_bytes(model: Any) -> int:
    """Bytes of the constants of an ``openvino.Model``."""
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_byte_size() for node in constants)


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # OpenVINO raises plain RuntimeError for most, not for all
        if is_out_of_memory(error):
            raise DeviceMemoryError(
                "out of memory while OpenVINO compiles a graph",
                value=str(path),
                remedy="Close other programs, or use a smaller model.",
            ) from error
        raise EngineError(
            f"OpenVINO cannot read this graph ({_reason(error)})",
            value=str(path),
            remedy="Build it again: hcma-fast build --force.",
        ) from error


def runner(
    compiled: Any, spec: IOSpec, source: OnnxFile
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function that runs ``compiled``, made from ``source``, on CPU tensors, from any thread.

    Inputs are read where they lie. Outputs are copied out of OpenVINO's buffers, which the next
    call overwrites, so that they are the caller's.
    """
    # the weights are read from the source's memory
    held = (compiled.create_infer_request(), source)
    lock = threading.Lock()  # a request serves one call at a time

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feed = {name: inputs[name].contiguous().numpy() for name in spec.input_names}
        with lock:
            found = held[0].infer(feed, share_inputs=True, share_outputs=False)
        return {name: torch.from_numpy(found[name]) for name in spec.output_names}

    return run


def is_out_of_memory(error: Exception) -> bool:
    """Whether OpenVINO means by ``error`` that the host has no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("bad_alloc", "out of memory", "allocate", "create a memory")
    )


def _part_shared_weights(openvino: Any, model: Any) -> None:
    """Give each use of a square weight a copy of its own.

    OpenVINO's CPU plugin (2026.4) packs a weight once per address and shape. Where a graph
    multiplies by a square weight and by its transpose, as every gradient does, the second product
    silently gets the first one's packing. tests/export/backends/test_openvino.py shows it.
    """
    seen = set()
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            continue
        shape = tuple(node.get_output_shape(0))
        if len(shape) < 2 or shape[-1] != shape[-2]:
            continue
        address = node.data.ctypes.data
        for use in node.output(0).get_target_inputs():
            if address in seen:
                use.replace_source_output(_copy(openvino, node).output(0))
            seen.add(address)


def look_up_sinusoids(openvino: Any, model: Any) -> None:
    """Replace sines and cosines of timesteps by tables over all timesteps, in float32.

    In bfloat16 OpenVINO rounds the angles: 796 radians to the next multiple of 4. At full size that
    made the UNet's error 9% instead of 1.5%; torch's bfloat16 has 1.6%.

    Raises:
        EngineError: a sine or cosine is left, of something else than an integer times constants.
    """
    opset = openvino.opset13
    for node in model.get_ops():
        if node.get_type_name() not in ("Sin", "Cos"):
            continue
        found = _steps_and_frequencies(_source(node, 0))
        # (batch, frequencies), of one timestep each
        if found is None or len(node.get_output_partial_shape(0)) != 2:
            raise EngineError(
                "OpenVINO would round the angles of this graph's sinusoids to bfloat16",
                value=node.get_friendly_name(),
                remedy="Build it in float32, and report it.",
            )
        steps, frequencies = found
        angles = np.arange(TRAIN_STEPS, dtype=np.float32)[:, None] * frequencies.data.reshape(1, -1)
        table = np.sin(angles) if node.get_type_name() == "Sin" else np.cos(angles)
        index = opset.reshape(steps, np.array([-1], dtype=np.int64), special_zero=False)
        rows = opset.gather(opset.constant(table), index, opset.constant(0))
        node.output(0).replace(rows.output(0))


def _steps_and_frequencies(product: Any) -> tuple[Any, Any] | None:
    """Nodes of the integer and of the constant that ``product`` multiplies, where that is all."""
    if product.get_type_name() != "Multiply":
        return None
    sides = [_source(product, side) for side in (0, 1)]
    for frequencies, factor in (sides, reversed(sides)):
        steps = factor
        while steps.get_type_name() in ("Convert", "Unsqueeze", "Reshape"):
            if steps.get_output_element_type(0).is_integral():
                break
            steps = _source(steps, 0)
        known = frequencies.get_type_name() == "Constant"
        if known and steps.get_output_element_type(0).is_integral():
            return steps, frequencies
    return None


def _source(node: Any, place: int) -> Any:
    return node.input(place).get_source_output().get_node()


def _copy(openvino: Any, constant: Any) -> Any:
    # numpy has no bfloat16 and shows its bits as float16: the type must come from the constant
    own = openvino.Tensor(constant.get_element_type(), constant.get_output_shape(0))
    own.data[...] = constant.data
    return openvino.op.Constant(own, shared_memory=True)


def _openvino() -> Any:
    try:
        import openvino
        import openvino.frontend
    except ImportError as error:
        raise BackendError(
            "the backend openvino is not installed", remedy='Run pip install "hcma-fast[cpu]".'
        ) from error
    return openvino


def shared_core() -> Any:
    """The ``openvino.Core`` of this process: nobody may make another.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    return _core(_openvino())


@cache
def _core(openvino: Any) -> Any:
    """One for the process, never given back.

    A core gives its thread a stack for signals, and on its end that of before. Two that do not end
    in the order of a stack leave the thread with memory that is gone, and the next signal that
    Python handles, such as Ctrl-C, kills the process.
    """
    return openvino.Core()


def _no_precision(precision: str) -> BackendError:
    return BackendError(
        "OpenVINO cannot compute at this precision on this CPU",
        value=precision,
        remedy="Use float32.",
    )


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message, which says what; those before say where."""
    return str(error).strip().splitlines()[-1][:200]
