"""ONNX Runtime sessions on the providers that were asked for; never a silent fallback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcma_fast.errors import BackendError, EngineError
from hcma_fast.export.onnx.file import OnnxFile
from hcma_fast.specs import BATCH, IOSpec

CPU = ("CPUExecutionProvider",)
CUDA = ("CUDAExecutionProvider",)
TENSORRT = ("TensorrtExecutionProvider",)
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def onnxruntime_version() -> str:
    """Version of the installed ONNX Runtime.

    Raises:
        BackendError: it is not installed.
    """
    return str(_onnxruntime().__version__)


def open_session(
    source: Path | OnnxFile,
    providers: Sequence[str] = CPU,
    *,
    threads: int = 0,
    provider_options: Mapping[str, str] | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` over a graph.

    Args:
        source: a path is read by ONNX Runtime as it lies there now, an opened file from its
            descriptors.
        threads: that run a graph together; 0 for as many as there are cores.
        provider_options: of the first provider, see :func:`tensorrt_options`.

    Raises:
        BackendError: ONNX Runtime is missing, or runs on other providers than those asked for, or
            TensorRT does not take the whole graph.
        EngineError: the file cannot be read as a graph.
    """
    onnxruntime = _onnxruntime()
    missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise _no_provider(missing)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: they are raised as well
    # every session has threads of its own; spinning on, they would take the cores from the next one
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if tuple(providers) == TENSORRT:
        # what TensorRT does not take would be run by the CPU, without a word
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings: list[dict[str, str]] = [{} for _ in providers]
    settings[0].update(provider_options or {})
    path = source if isinstance(source, Path) else source.path
    how = {"providers": list(providers), "provider_options": settings}
    try:
        if isinstance(source, Path):
            session = onnxruntime.InferenceSession(str(source), options, **how)
        else:
            session = _opened_session(onnxruntime, source, options, how)
    except Exception as error:  # onnxruntime raises kinds of its own that share no base class
        if "fallback to CPU EP has been explicitly disabled" in str(error):
            raise BackendError(
                "ONNX Runtime's TensorRT provider does not take the whole graph",
                value=str(path),
                remedy="Use the backend tensorrt, or onnxruntime with --device cuda.",
            ) from error
        raise EngineError(
            f"ONNX Runtime cannot read this graph ({str(error).splitlines()[0][:200]})",
            value=str(path),
            remedy="Build it again: hcma-fast build --force.",
        ) from error
    if session.get_providers()[: len(providers)] != list(providers):
        raise _no_provider(list(providers))
    return session


def _opened_session(
    onnxruntime: Any, source: OnnxFile, options: Any, how: Mapping[str, Any]
) -> Any:
    """A session from the graph's bytes; it maps the weights by the paths of their descriptors.

    ONNX Runtime can take weights from memory too, but makes a copy of all of them meanwhile.
    """
    # it refuses the path of a descriptor whose file has lost its name: that one is copied
    plain = not all(file.has_name for file in source.weights.values())
    while True:
        with contextlib.ExitStack() as stack:
            paths = {
                name: stack.enter_context(file.named(plain=plain))
                for name, file in source.weights.items()
            }
            model = source.model()
            for tensor in model.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        # relative to the root, since absolute ones are refused
                        path = paths[entry.value]
                        entry.value = path.relative_to(path.anchor).as_posix()
            for path in paths.values():
                options.add_session_config_entry(_WEIGHTS_FOLDER, path.anchor)
            try:
                return onnxruntime.InferenceSession(model.SerializeToString(), options, **how)
            except Exception:
                if plain or all(file.has_name for file in source.weights.values()):
                    raise
        plain = True  # the name was lost meanwhile


def tensorrt_options(spec: IOSpec, folder: Path, device: torch.device) -> dict[str, str]:
    """For :func:`open_session` on ``TENSORRT``: batch range as in the spec, caches in ``folder``.

    The precision is that of the graph. With the range given, TensorRT builds its engine as the
    session opens, not at the first call or anew at each larger batch.
    """
    options = {
        "device_id": str(device.index or 0),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    if spec.batch.static:
        return options
    for kind in ("min", "opt", "max"):
        batch = getattr(spec.batch, kind)
        shapes = (
            f"{tensor.name}:" + "x".join(str(batch if n == BATCH else n) for n in tensor.shape)
            for tensor in spec.inputs
        )
        options[f"trt_profile_{kind}_shapes"] = ",".join(shapes)
    return options


def runner(session: Any, spec: IOSpec) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function that runs ``session`` on CPU tensors; they go in and come out without a copy."""

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feed = {name: inputs[name].contiguous().numpy() for name in spec.input_names}
        outputs = session.run(list(spec.output_names), feed)
        pairs = zip(spec.output_names, outputs, strict=True)
        return {name: torch.from_numpy(value) for name, value in pairs}

    return run


def cuda_runner(
    session: Any, spec: IOSpec, device: torch.device
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """As :func:`runner`, for a session on CUDA: torch's CUDA tensors are bound where they lie."""

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {name: inputs[name].contiguous() for name in spec.input_names}
        batch = next(iter(given.values())).shape[0]
        outputs = {
            tensor.name: torch.empty(
                [batch if size == BATCH else int(size) for size in tensor.shape],
                dtype=getattr(torch, tensor.dtype),
                device=device,
            )
            for tensor in spec.outputs
        }
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, given), (binding.bind_output, outputs)):
            for name, value in tensors.items():
                kind = np.int64 if value.dtype == torch.int64 else np.float32
                bind(name, "cuda", device.index or 0, kind, list(value.shape), value.data_ptr())
        # ONNX Runtime has a stream of its own: what torch has queued must be done before
        torch.cuda.current_stream(device).synchronize()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return outputs

    return run


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "the backend onnxruntime is not installed",
            remedy='Run pip install "hcma-fast[cpu]", or "hcma-fast[gpu]" for NVIDIA GPUs.',
        ) from error
    return onnxruntime


def _no_provider(names: list[str]) -> BackendError:
    remedy = "Install the build that has it; hcma-fast doctor shows what is there."
    if names == list(TENSORRT):
        remedy = (
            "Install onnxruntime-gpu and the TensorRT release that it was built with (the table of "
            "its TensorRT execution provider says which), or use the backend tensorrt."
        )
    return BackendError(
        "ONNX Runtime does not offer this execution provider",
        value=", ".join(names),
        remedy=remedy,
    )
