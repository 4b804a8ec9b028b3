"""torch eager: the reference that every other backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.specs import IOSpec


class EagerEngine:
    """Runs a graph's module as it is, on the device where the module lies."""

    def __init__(self, module: nn.Module, spec: IOSpec) -> None:
        self.module = module.eval()
        self.spec = spec

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.engine.Engine`.

        Raises:
            DeviceMemoryError: the host or the device has no memory left.
        """
        try:
            outputs = self.module(*(inputs[name] for name in self.spec.input_names))
        except RuntimeError as error:
            # on the CPU torch raises a plain RuntimeError
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise DeviceMemoryError(
                    f"out of memory in the graph {self.spec.graph}",
                    remedy="Generate fewer images at once.",
                ) from error
            raise
        return dict(zip(self.spec.output_names, outputs, strict=True))
