"""The one protocol between the sampler and whatever computes a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from hcma_fast.specs import IOSpec


class Engine(Protocol):
    """A compiled (or eager) graph: tensors by name in, tensors by name out."""

    @property
    def spec(self) -> IOSpec:
        """Names, shapes and dtypes."""
        ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute; entries that the spec does not name are ignored."""
        ...
