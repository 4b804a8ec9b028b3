"""OpenVINO as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.openvino_model import (
    OpenVINOPrecision,
    is_out_of_memory,
    open_model,
    openvino_version,
    runner,
)
from hcma_fast.specs import IOSpec

__all__ = ["OpenVINOEngine", "openvino_version"]


class OpenVINOEngine:
    """Runs one ONNX file on the CPU; inputs are not copied, outputs are the caller's.

    Args:
        path: the .onnx file; weights outside of it are read from its folder.
        precision: of the products inside; inputs and outputs keep the spec's dtypes.
        threads: default: all cores.

    Raises:
        BackendError: OpenVINO is missing, or would compute in another precision on this CPU.
        EngineError: the file cannot be read as a graph.
        DeviceMemoryError: the host has no memory left.
    """

    def __init__(
        self,
        path: Path,
        spec: IOSpec,
        *,
        precision: OpenVINOPrecision = "float32",
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self._run = runner(open_model(path, precision=precision, threads=threads), spec)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.runtime.engine.Engine`.

        Raises:
            DeviceMemoryError: the host has no memory left.
        """
        try:
            return self._run(inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise DeviceMemoryError(
                    f"out of memory in the graph {self.spec.graph}",
                    remedy="Generate fewer images at once.",
                ) from error
            raise
