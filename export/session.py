"""ONNX Runtime sessions on the providers that were asked for; never a silent fallback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcma_fast.errors import BackendError, EngineError
from hcma_fast.specs import IOSpec

CPU = ("CPUExecutionProvider",)


def onnxruntime_version() -> str:
    """Version of the installed ONNX Runtime.

    Raises:
        BackendError: it is not installed.
    """
    return str(_onnxruntime().__version__)


def open_session(path: Path, providers: Sequence[str] = CPU) -> Any:
    """An ``onnxruntime.InferenceSession`` over the file at ``path``.

    Raises:
        BackendError: ONNX Runtime is missing, or runs on other providers than those asked for.
        EngineError: the file cannot be read as a graph.
    """
    onnxruntime = _onnxruntime()
    missing = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise _no_provider(missing)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: they are raised as well
    # every session has threads of its own; spinning, they would take the cores from the next one
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime raises kinds of its own that share no base class
        raise EngineError(
            f"ONNX Runtime cannot read this graph ({str(error).splitlines()[0][:200]})",
            value=str(path),
            remedy="Build it again: hcma-fast build --force.",
        ) from error
    if session.get_providers()[: len(providers)] != list(providers):
        raise _no_provider(list(providers))
    return session


def runner(session: Any, spec: IOSpec) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function that runs ``session`` on CPU tensors; they go in and come out without a copy."""

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feed = {name: inputs[name].contiguous().numpy() for name in spec.input_names}
        outputs = session.run(list(spec.output_names), feed)
        pairs = zip(spec.output_names, outputs, strict=True)
        return {name: torch.from_numpy(value) for name, value in pairs}

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
    return BackendError(
        "ONNX Runtime does not offer this execution provider",
        value=", ".join(names),
        remedy="Install the build that has it; hcma-fast doctor shows what is there.",
    )
