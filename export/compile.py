"""One graph to the file that a backend runs, and a function that runs it for validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from hcma_fast.errors import EngineError
from hcma_fast.export import aoti, openvino_model
from hcma_fast.export import session as ort
from hcma_fast.export.onnx_graph import export_onnx
from hcma_fast.export.target import Target
from hcma_fast.export.trt_engine import TRTOptions, TRTReport, build_trt
from hcma_fast.export.weights_file import WeightsFile, check_external_data
from hcma_fast.specs import IOSpec

Runner = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
Checked = Literal["engine", "onnx"]


@dataclass(frozen=True)
class CompiledGraph:
    """A graph's file, and what is known of it."""

    file: Path
    run: Runner
    """for validation"""
    checked: Checked
    """whose values ``run`` gives: the engine's, or those of the ONNX graph that it comes from"""
    report: TRTReport | None = None


def compile_graph(
    spec: IOSpec,
    module: nn.Module,
    folder: Path,
    weights: WeightsFile,
    target: Target,
    *,
    vocabulary: int,
    progress: Callable[[str], None],
) -> CompiledGraph:
    """Export and compile; ``progress`` is called with the stages "export" and "compile".

    Raises:
        BackendError, DeviceMemoryError, EngineError: as the backend's own builder.
    """
    if target.backend == "torch-compile":
        progress("compile")
        file = folder / f"{spec.graph}.pt2"
        aoti.compile_aoti(spec, module, file)
        return CompiledGraph(file, aoti.runner(file, spec), "engine")
    progress("export")
    file = folder / f"{spec.graph}.onnx"
    export_onnx(spec, module, file, weights, vocabulary=vocabulary)
    check_external_data(file)
    if target.backend == "openvino":
        progress("compile")
        model = openvino_model.open_model(
            file, precision="bfloat16" if target.precision == "bfloat16" else "float32"
        )
        return CompiledGraph(file, openvino_model.runner(model, spec), "engine")
    session = ort.open_session(file)
    _check_names(spec, session)
    run = ort.runner(session, spec)
    if target.backend == "onnxruntime":
        return CompiledGraph(file, run, "engine")
    progress("compile")
    engine = folder / f"{spec.graph}.engine"
    options = TRTOptions(
        library="tensorrt" if target.backend == "tensorrt" else "tensorrt-rtx",
        architectures=target.architectures,
        workspace_mib=target.workspace_mib,
        strip_weights=target.strip_weights,
    )
    return CompiledGraph(engine, run, "onnx", build_trt(file, spec, engine, options))


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
