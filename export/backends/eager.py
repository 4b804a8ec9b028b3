"""torch eager: the reference that every other backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.channels_last import channels_last
from hcma_fast.export.precision import Precision, at_precision
from hcma_fast.specs import GraphName, IOSpec


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


def eager_engines(
    graphs: Mapping[GraphName, nn.Module],
    specs: Mapping[GraphName, IOSpec],
    device: str,
    precision: Precision = "float32",
) -> dict[GraphName, EagerEngine]:
    """An engine for each graph, on ``device``. In float32 the modules themselves are moved there.

    In half precision they are copies, which share weights as ``graphs`` do; on a GPU they have
    their channels last.
    """
    halves: dict[int, nn.Parameter] = {}
    turned = precision != "float32" and torch.device(device).type == "cuda"
    engines = {}
    for name, module in graphs.items():
        # moved first: a GPU converts faster, and weights that were shared stay so
        own = at_precision(name, module.to(device), precision, halves)
        if turned and name != "grounding":
            own = channels_last(own)
        engines[name] = EagerEngine(own, specs[name])
    return engines
