"""ONNX Runtime as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.session import CUDA, cuda_runner, open_session, runner
from hcma_fast.specs import IOSpec


class OrtEngine:
    """Runs one ONNX file; tensors go in and out without a copy.

    Args:
        device: "cpu" or "cuda"; tensors must lie there.

    Raises:
        BackendError: this ONNX Runtime has no CUDA.
        EngineError: the file cannot be read.
    """

    def __init__(self, path: Path, spec: IOSpec, *, device: str = "cpu") -> None:
        self.spec = spec
        if torch.device(device).type == "cuda":
            self._run = cuda_runner(open_session(path, CUDA), spec, torch.device(device))
        else:
            self._run = runner(open_session(path), spec)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.runtime.engine.Engine`.

        Raises:
            DeviceMemoryError: the host has no memory left.
        """
        try:
            return self._run(inputs)
        except Exception as error:  # onnxruntime's kinds share no base class but this one
            if "alloc" in str(error).lower():
                raise DeviceMemoryError(
                    f"out of memory in the graph {self.spec.graph}",
                    remedy="Generate fewer images at once.",
                ) from error
            raise
