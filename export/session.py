"""ONNX Runtime sessions: the providers that were asked for, or an error; never a silent fallback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hcma_fast.errors import BackendError, EngineError

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
