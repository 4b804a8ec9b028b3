"""From an engine folder to engines, and which backend to take when the user leaves it open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch

from hcma_fast.engine import Engine
from hcma_fast.errors import BackendError, EngineError, UsageError
from hcma_fast.export.backends.aoti.engine import CompiledEngine
from hcma_fast.export.backends.onnxruntime.engine import OrtEngine
from hcma_fast.export.backends.openvino.engine import OpenVINOEngine
from hcma_fast.export.backends.openvino.model import precision_of
from hcma_fast.export.backends.trt.build import TRTLibrary
from hcma_fast.export.backends.trt.engine import TRTEngine
from hcma_fast.export.kernel_cache import kernel_folder
from hcma_fast.export.manifest import (
    GraphRecord,
    VerifiedFolder,
    check_usable,
    open_folder,
)
from hcma_fast.export.target import PRECISIONS_OF, TRT_LIBRARIES
from hcma_fast.export.validate import cases_for, measure, on_device
from hcma_fast.models.checkpoint.folder import ModelSource
from hcma_fast.sampling.exported import graph_of
from hcma_fast.specs import GraphName

_MODULES = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}


def choose_backend(device: str | None = None, precision: str | None = None) -> tuple[str, str]:
    """The backend for ``auto``, by what is installed and if there is a GPU: its name, and why.

    Args:
        device, precision: what the user insists on, if anything.

    Raises:
        BackendError: no compiled backend is installed that has them.
    """
    gpu = torch.cuda.is_available()
    wanted = device.split(":")[0] if device else None
    on_gpu = (*TRT_LIBRARIES, "onnxruntime") if wanted == "cuda" else TRT_LIBRARIES
    on_cpu = () if wanted == "cuda" else ("onnxruntime", "openvino")
    order = [
        name
        for name in (*(on_gpu if gpu and wanted != "cpu" else ()), *on_cpu)
        if precision is None or precision in PRECISIONS_OF[name]
    ]
    there = f"torch finds {'an NVIDIA GPU' if gpu else 'no NVIDIA GPU'}"
    for name in order:
        if find_spec(_MODULES[name]) is not None:
            skipped = order[: order.index(name)]
            missing = f"; {', '.join(skipped)} not installed" if skipped else ""
            return name, f"{there}, and {name} is installed{missing}"
    raise BackendError(
        "no compiled backend is installed that has this device and precision",
        value=f"{device or 'any device'}, {precision or 'any precision'}",
        remedy='Run pip install "hcma-fast[cpu]", or use backend="eager".',
    )


def open_engines(opened: VerifiedFolder, device: str) -> dict[GraphName, Engine]:
    """All engines of a folder, from its opened files.

    Raises:
        BackendError: the backend is not installed, or does not run on ``device``.
        EngineError: the folder is of another version or machine.
        DeviceMemoryError: out of memory.
        UsageError: TensorRT or torch-compile, and not torch's current GPU.
    """
    manifest = opened.manifest
    built_for = manifest.target.device
    if manifest.backend == "torch-compile" and torch.device(device).type != built_for:
        raise BackendError(
            f"the code in this engine folder was compiled for the device {built_for}",
            value=device,
            remedy="Leave the device out, or build again: hcma-fast build --backend torch-compile "
            f"--device {torch.device(device).type}.",
        )
    check_usable(manifest)
    card = torch.device(device).index
    on_card = manifest.backend in (*TRT_LIBRARIES, "torch-compile") and card is not None
    if on_card and card != torch.cuda.current_device():
        raise UsageError(
            f"engines of {manifest.backend} run on torch's current GPU",
            value=device,
            remedy=f"Set CUDA_VISIBLE_DEVICES={card} and use cuda.",
        )
    return {name: open_engine(opened, name, device) for name in manifest.graphs}


def open_engine(opened: VerifiedFolder, name: GraphName, device: str) -> Engine:
    """One of :func:`open_engines`, which checks that the folder fits what is installed."""
    manifest = opened.manifest
    record, backend = manifest.graphs[name], manifest.backend
    if backend in TRT_LIBRARIES:
        return _open_trt(opened, record, backend)
    if backend == "onnxruntime":
        return OrtEngine(opened.onnx(record.file), record.spec, device=device)
    if backend == "onnxruntime-tensorrt":
        kept = kernel_folder(opened.path / record.file, record.sha256)
        # TensorRT's parser reads weights beside the graph's path
        with opened.onnx(record.file).plain() as path:
            return OrtEngine(path, record.spec, device=device, tensorrt=kept)
    if backend == "openvino":
        precision = precision_of(name, manifest.precision)
        return OpenVINOEngine(opened.onnx(record.file), record.spec, precision=precision)
    return CompiledEngine(opened.files[record.file], record.spec)


def _open_trt(opened: VerifiedFolder, record: GraphRecord, library: TRTLibrary) -> TRTEngine:
    file = opened.path / record.file
    kernels = runtime_cache(file, record.sha256) if library == "tensorrt-rtx" else None
    with ExitStack() as stack:
        onnx = None
        if opened.manifest.target.strip_weights:
            graph = opened.onnx(Path(record.file).with_suffix(".onnx").as_posix())
            onnx = stack.enter_context(graph.plain())
        return TRTEngine(
            opened.files[record.file],
            record.spec,
            library,
            weights_onnx=onnx,
            runtime_cache=kernels,
            user_allocation=record.engine is not None and record.engine.user_allocation,
        )


def runtime_cache(engine: Path, sha256: str) -> Path:
    """Where TensorRT-RTX's kernels for this engine and the GPU here lie."""
    gpu = "{}-{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "0"
    return kernel_folder(engine, sha256) / f"sm{gpu}"


def verify(
    folder: Path, source: ModelSource, verify_key: Path | None = None
) -> Iterator[tuple[GraphName, GraphRecord, float]]:
    """Compare every engine of a folder with torch again: graph, its record, relative error now.

    Args:
        verify_key: public key that must have signed the folder, if any.

    Raises:
        EngineError: the folder is damaged, of another version, of other weights, or not signed.
        InputError, UsageError: the key cannot be read.
    """
    opened = open_folder(folder, verify_key)
    manifest = opened.manifest
    if manifest.weights_hash != source.weights_hash:
        raise EngineError(
            "these engines were built from other weights than those of the model",
            value=manifest.weights_hash[:16],
            remedy="Name the model that they were built from with --model.",
        )
    target = manifest.target
    engines = open_engines(opened, manifest.device)
    for name, engine in engines.items():
        module = graph_of(source, name, target.height, target.width)
        error = measure(
            engine.spec,
            module,
            on_device(engine, manifest.device),
            vocabulary=len(source.tokenizer),
            cases=cases_for(engine.spec, module),
        )
        yield name, manifest.graphs[name], error
