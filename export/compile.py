"""One graph through a backend: export it, open it for validation, compile it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hcma_fast.export.backends.aoti import build as aoti
from hcma_fast.export.backends.onnxruntime import session as ort
from hcma_fast.export.backends.openvino import model as openvino_model
from hcma_fast.export.backends.trt.build import TRTReport, build_trt
from hcma_fast.export.onnx.export import export_onnx
from hcma_fast.export.onnx.file import OnnxFile
from hcma_fast.export.signature import check_onnx_signature
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
        BackendError, EngineError: as the exporter; the graph has other inputs or outputs than
            ``spec``, such as one that was dropped, as it does not reach an output.
    """
    if target.backend == "torch-compile":
        file = folder / f"{spec.graph}.pt2"
        aoti.compile_aoti(spec, module, file, device=target.device, tuning=target.tuning)
        return file
    file = folder / f"{spec.graph}.onnx"
    export_onnx(spec, module, file, weights, vocabulary=vocabulary)
    check_onnx_signature(spec, check_external_data(file))
    return file


def open_graph(file: Path, spec: IOSpec, target: Target) -> Runner:
    """A function of tensors on the CPU that runs what :func:`export_graph` wrote.

    That is the engine itself, on its GPU if it is for one, but for TensorRT, whose ONNX is run by
    ONNX Runtime on the CPU.

    Raises:
        BackendError, DeviceMemoryError, EngineError: it cannot be opened.
    """
    if target.backend == "torch-compile":
        return on_device(aoti.runner(file, spec), target.device)
    if target.backend == "openvino":
        precision = openvino_model.precision_of(spec.graph, target.precision)
        opened = OnnxFile.open(file)
        compiled = openvino_model.open_model(opened, precision=precision)
        return openvino_model.runner(compiled, spec, opened)
    return ort.runner(ort.open_session(OnnxFile.open(file)), spec)


def compile_engine(file: Path, spec: IOSpec, target: Target) -> tuple[Path, TRTReport | None]:
    """The engine of the ONNX ``file``, beside it, and TensorRT's report; else ``file`` itself.

    Raises:
        BackendError, DeviceMemoryError, EngineError: see :func:`build_trt`.
    """
    if target.backend not in TRT_LIBRARIES:
        return file, None
    engine = file.with_suffix(".engine")
    return engine, build_trt(file, spec, engine, target.trt_options())
