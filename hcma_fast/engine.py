"""The one protocol between the sampler and whatever computes a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class Stateful(Engine, Protocol):
    """An engine that holds state for the shape it runs, as TensorRT's context does."""

    def fork(self, captured: bool = True) -> Engine:
        """The same engine with state of its own; ``captured``: fit for a CUDA graph."""
        ...

    def check_capturable(self) -> None:
        """Whether a CUDA graph can hold what it does; after a run it knows for sure.

        Raises:
            BackendError: it cannot.
        """
        ...
