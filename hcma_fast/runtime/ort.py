"""ONNX Runtime as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.session import open_session, runner
from hcma_fast.specs import IOSpec


class OrtEngine:
    """Runs one ONNX file on the CPU; tensors go in and out without a copy."""

    def __init__(self, path: Path, spec: IOSpec) -> None:
        self.spec = spec
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
