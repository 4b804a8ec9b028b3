"""From an engine folder to engines, and which backend to take when the user leaves it open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from hcma_fast.engine import Engine
from hcma_fast.errors import BackendError, EngineError, UsageError
from hcma_fast.export.backends.aoti import build as aoti
from hcma_fast.export.backends.aoti.engine import CompiledEngine
from hcma_fast.export.backends.onnxruntime.engine import OrtEngine
from hcma_fast.export.backends.openvino.engine import OpenVINOEngine
from hcma_fast.export.backends.openvino.model import precision_of
from hcma_fast.export.backends.trt.build import ARCHITECTURES, TRTLibrary
from hcma_fast.export.backends.trt.engine import TRTEngine
from hcma_fast.export.kernel_cache import kernel_folder
from hcma_fast.export.manifest import (
    GraphRecord,
    VerifiedFolder,
    check_usable,
    open_folder,
)
from hcma_fast.export.precision import PRECISIONS
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
_ON_GPU = ("tensorrt", "tensorrt-rtx", "torch-compile", "eager")
"""The fastest first, by what others published; onnxruntime is the last that is compiled"""


@dataclass(frozen=True)
class Choice:
    """What ``auto`` takes."""

    backend: str
    precision: str | None
    """None: the backend's own default"""
    device: str | None
    """None: the backend's own default"""
    why: str

    @property
    def label(self) -> str:
        """Backend and precision."""
        return self.backend if self.precision is None else f"{self.backend} in {self.precision}"


def choose_backend(
    device: str | None = None, precision: str | None = None, *, build: bool = False
) -> Choice:
    """What to take for ``auto``: by the GPU, what is installed, and what fits it.

    On an NVIDIA GPU: TensorRT, TensorRT-RTX, torch-compile, eager, in float16 unless another
    precision is asked for. Else ONNX Runtime, then OpenVINO.

    Args:
        device, precision: what the user insists on, if anything.
        build: engines are to be built, so eager is no answer.

    Raises:
        BackendError: no backend is installed that has them.
    """
    gpu = torch.cuda.is_available()
    kind = device.split(":")[0] if device else None
    skipped: list[str] = []
    if gpu and kind in (None, "cuda"):
        wanted = precision or "float16"
        for name in (*_ON_GPU, *(("onnxruntime",) if kind == "cuda" else ())):
            if name == "eager" and build:
                continue
            problem = _obstacle(name, wanted)
            if problem is None:
                return _choice("torch finds an NVIDIA GPU", name, wanted, device or "cuda", skipped)
            skipped.append(problem)
    if kind != "cuda":
        there = f"torch finds {'an NVIDIA GPU' if gpu else 'no NVIDIA GPU'}"
        for name in ("onnxruntime", "openvino"):
            problem = _obstacle(name, precision)
            if problem is None:
                return _choice(there, name, precision, device, skipped)
            skipped.append(problem)
    raise BackendError(
        f"no backend is here that has this device and precision ({'; '.join(skipped)})"
        if skipped
        else "no backend is here that has this device, since torch finds no NVIDIA GPU",
        value=f"{device or 'any device'}, {precision or 'any precision'}",
        remedy='Run pip install "hcma-fast[cpu]", or use backend="eager".',
    )


def _choice(
    there: str, name: str, precision: str | None, device: str | None, skipped: list[str]
) -> Choice:
    why = "; ".join([f"{there}, and {name} is installed", *skipped])
    return Choice(name, precision, device, why)


def _obstacle(name: str, precision: str | None) -> str | None:
    """Why a backend is not to be taken here; None where it is."""
    module = _MODULES.get(name)
    if module is not None and find_spec(module) is None:
        return f"{name} is not installed"
    possible = PRECISIONS if name == "eager" else PRECISIONS_OF[name]
    if precision not in (None, *possible):
        return f"{name} has no {precision}"
    if name == "tensorrt-rtx":
        architecture = "sm{}{}".format(*torch.cuda.get_device_capability())
        if architecture not in ARCHITECTURES["tensorrt-rtx"]:
            return f"{name} has no engines for {architecture}"
    if name == "torch-compile":
        try:
            aoti.check_compiler("cuda")
        except BackendError as error:
            return error.what
    return None


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
