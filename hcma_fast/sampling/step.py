"""A step by the separate graphs, stated once: the eager and the captured loop both call it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from hcma_fast.engine import Engine
from hcma_fast.sampling.schedule import Networks
from hcma_fast.specs import GraphName


class SeparateStep(ABC):
    """One evaluation by `align`, `unet_grounded` and `unet_plain` (paper Eq. 8 and 9).

    Subclasses say where the numbers of an evaluation and its tensors lie.
    """

    def advance(self, networks: Networks) -> None:
        """Align, denoise, combine, step."""
        # the alignment once, before the copy for guidance
        self._align(networks.aligned)
        unet = self._engine("unet_grounded" if networks.grounded else "unet_plain", networks.guided)
        eps = unet(self._unet_inputs(networks))["noise_pred"]
        # both halves of the guidance are one batch
        self._combine(*(eps.chunk(2) if networks.guided else (None, eps)))

    @abstractmethod
    def _align(self, computed: bool) -> None:
        """Move the latent, by a gradient of now or of an earlier step."""

    @abstractmethod
    def _engine(self, name: GraphName, guided: bool) -> Engine:
        """The engine of a graph, for both halves of the guidance or for one."""

    @abstractmethod
    def _unet_inputs(self, networks: Networks) -> Mapping[str, Tensor]:
        """What the UNet takes; the latent once per half of the guidance."""

    @abstractmethod
    def _combine(self, unconditional: Tensor | None, conditional: Tensor) -> None:
        """Guidance, the solver's update, and on to the next evaluation."""
