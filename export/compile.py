"""One graph through a backend: export it, open it for validation, compile it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hcma_fast.errors import EngineError
from hcma_fast.export.backends.aoti import build as aoti
from hcma_fast.export.backends.onnxruntime import session as ort
from hcma_fast.export.backends.openvino import model as openvino_model
from hcma_fast.export.backends.trt.build import TRTReport, build_trt
from hcma_fast.export.onnx.export import export_onnx
from hcma_fast.export.target import TRT_LIBRARIES, Target
from hcma_fast.export.validate import Runner, on_device
from hcma_fast.export.weights_file import WeightsFile, check_external_data
from hcma_fast.specs import IOSpec


def export_graph(
    spec: IOSpec,
    module: nn.Module,
    folder: Path,
    weights: WeightsFile,
    target: Target,
    *,
    vocabulary: int,
) -> Path:
    """Write the graph to ``folder``: as ONNX, or as native code for torch-compile.

    Raises:
        BackendError, EngineError: as the exporter.
    """
    if target.backend == "torch-compile":
        file = folder / f"{spec.graph}.pt2"
        aoti.compile_aoti(spec, module, file, device=target.device)
        return file
    file = folder / f"{spec.graph}.onnx"
    export_onnx(spec, module, file, weights, vocabulary=vocabulary)
    check_external_data(file)
    return file


def open_graph(file: Path, spec: IOSpec, target: Target) -> Runner:
    """A function of tensors on the CPU that runs what :func:`export_graph` wrote.

    That is the engine itself, on its GPU if it is for one, but for TensorRT, whose ONNX is run by
    ONNX Runtime on the CPU.

    Raises:
        BackendError, DeviceMemoryError, EngineError: it cannot be opened, or has other inputs or
            outputs than ``spec``.
    """
    if target.backend == "torch-compile":
        return on_device(aoti.runner(file, spec), target.device)
    if target.backend == "openvino":
        precision = openvino_model.precision_of(spec.graph, target.precision)
        return openvino_model.runner(openvino_model.open_model(file, precision=precision), spec)
    session = ort.open_session(file)
    _check_names(spec, session)
    return ort.runner(session, spec)


def compile_engine(file: Path, spec: IOSpec, target: Target) -> tuple[Path, TRTReport | None]:
    """The engine of the ONNX ``file``, beside it, and TensorRT's report; else ``file`` itself.

    Raises:
        BackendError, DeviceMemoryError, EngineError: see :func:`build_trt`.
    """
    if target.backend not in TRT_LIBRARIES:
        return file, None
    engine = file.with_suffix(".engine")
    return engine, build_trt(file, spec, engine, target.trt_options())


def _check_names(spec: IOSpec, session: object) -> None:
    """A graph may drop an input that does not reach an output; then its caller would fail."""
    inputs = tuple(entry.name for entry in session.get_inputs())  # type: ignore[attr-defined]
    outputs = tuple(entry.name for entry in session.get_outputs())  # type: ignore[attr-defined]
    if (inputs, outputs) != (spec.input_names, spec.output_names):
        raise EngineError(
            f"the exported graph {spec.graph} has other inputs or outputs than its signature",
            value=f"{inputs} -> {outputs}",
            remedy="This is a fault of the export: report it, with hcma-fast doctor.",
        )
