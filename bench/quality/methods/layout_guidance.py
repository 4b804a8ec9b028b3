"""Layout guidance (Chen et al. 2023, arXiv:2304.03373, "Training-free layout control with
cross-attention guidance"), its backward guidance.

For token i of an object with box B and a layer's map A, the energy is
E = (1 - sum_{u in B} A_ui / sum_u A_ui)^2, averaged over layers, heads, objects and each object's
tokens; layers are those of the mid block and of the first up block. The latent moves by
z' = z - sigma_t^2 eta grad_z E, up to 5 times at each of the first 10 steps, until E <= 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcma_fast.bench.quality.methods.attention import AttentionMap
from hcma_fast.bench.quality.methods.guidance import GuidanceStep
from hcma_fast.bench.quality.methods.targets import Target, box_cells, box_mask


@dataclass
class LayoutGuidance:
    """The guide of one image. It keeps the last energy from step to step, as the paper's code."""

    targets: tuple[Target, ...]
    scale: float = 30.0
    """eta"""
    threshold: float = 0.2
    most_iterations: int = 5
    share: float = 0.2
    """of the steps that are guided, from the first (10 of 50)"""
    last: float | None = None

    def __call__(self, z: Tensor, step: GuidanceStep) -> tuple[Tensor, float | None]:
        """See :class:`hcma_fast.bench.quality.methods.guidance.Guide`.

        The paper's sigma_t^2 = (1 - abar_t) / abar_t belongs to latents that are larger by
        1 / sqrt(abar_t) than ours. On ours the same move is (1 - abar_t) eta grad_z E.
        """
        if step.number >= round(self.share * step.total):
            return z, None
        moved = None
        for _ in range(self.most_iterations):
            # once reached, the threshold ends the guidance for good
            if self.last is not None and self.last <= self.threshold:
                break
            leaf, maps = step.forward(z)
            loss = self.energy(maps)
            z = z - self.scale * (1 - step.abar) * step.gradient(loss, leaf)
            self.last = moved = float(loss.detach())
        return z, moved

    def energy(self, maps: list[AttentionMap]) -> Tensor:
        """E of one forward pass, a scalar."""
        layers = [m for m in maps if m.place == "mid" or (m.place == "up" and m.block == 0)]
        return torch.stack(
            [layout_energy(layer.probabilities, self.targets) for layer in layers]
        ).mean()


def layout_energy(probabilities: Tensor, targets: tuple[Target, ...]) -> Tensor:
    """E of one layer, mean over heads and objects.

    Args:
        probabilities: (heads, h, w, 77). Returns a scalar in [0, 1].
    """
    height, width = probabilities.shape[1:3]
    energies = []
    for target in targets:
        cells = [box_cells(box, height, width, truncate=True) for box in target.boxes]
        maps = probabilities[..., list(target.tokens)].movedim(-1, 1)
        inside = (maps * box_mask(cells, maps[0, 0])).sum((2, 3)) / maps.sum((2, 3))
        energies.append(((1 - inside) ** 2).mean())
    return torch.stack(energies).mean()
