"""torch.compile's ahead-of-time kind (AOTInductor) as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.aoti import runner
from hcma_fast.specs import IOSpec


class CompiledEngine:
    """Runs one .pt2 file of :func:`hcma_fast.export.aoti.compile_aoti`, on its device.

    Loading runs native code from the file, so the caller must have compared its sha256 with the
    manifest's before.

    Raises:
        EngineError: the file cannot be read, or was compiled for another CPU, GPU or torch.
    """

    def __init__(self, path: Path, spec: IOSpec) -> None:
        self.spec = spec
        self._run = runner(path, spec)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.runtime.engine.Engine`.

        The outputs are new memory, the caller's; the captured sampler copies what it keeps.

        Raises:
            InputError: a tensor is not as the spec says; the native code trusts its inputs.
            DeviceMemoryError: the host or the device has no memory left.
        """
        try:
            return self._run(inputs)
        except RuntimeError as error:
            # on the CPU torch raises a plain RuntimeError
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise DeviceMemoryError(
                    f"out of memory in the graph {self.spec.graph}",
                    remedy="Generate fewer images at once.",
                ) from error
            raise
