"""Attend-and-Excite (Chefer et al. 2023, arXiv:2301.13826): no object of the caption is neglected.

With A^s the map of subject token s, smoothed: L_s = 1 - max(A^s), L = max_s L_s, and the latent
moves by z' = z - alpha_t grad_z L. At three steps it is refined until L is low enough. The layout's
boxes are not used, only which tokens the subjects are. Constants are those of the published code,
and so is the refinement: the paper checks the threshold before each move, the code after it, by the
loss of before the move.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from hcma_fast.bench.quality.methods.attention import AttentionMap, Energy, mean_map
from hcma_fast.bench.quality.methods.guidance import GuidanceStep
from hcma_fast.bench.quality.methods.targets import Target

_SHARPNESS = 100.0
_SIGMA = 0.5


@dataclass(frozen=True)
class RefinedUpdates:
    """When and how far the latent moves: alpha_t and the refinement, as shares of the steps."""

    share: float = 0.5
    """of the steps that are altered, from the first (25 of 50)"""
    scale: float = 20.0
    decay: tuple[float, float] = (1.0, 0.5)
    """alpha_t is the scale times the root of a line from the first to the second"""
    thresholds: dict[float, float] = field(default_factory=lambda: {0.0: 0.05, 0.2: 0.5, 0.4: 0.8})
    """attention that is asked for at these shares of the steps (0, 10 and 20 of 50)"""
    most_refinements: int = 20

    def apply(
        self,
        z: Tensor,
        step: GuidanceStep,
        energy: Energy,
        refined: Energy,
        stale: Energy | None = None,
    ) -> tuple[Tensor, float | None]:
        """One step's update of z (1, 4, h, w), and its loss before its last move.

        A refinement moves, and then ends if the loss of before that move was 1 - threshold or less:
        one move more than to the first latent that is good enough.

        Args:
            energy: the loss of the last move, without ``stale``.
            refined: the loss that refinement lowers.
            stale: more of the last move's loss, of the step's first forward pass alone: after a
                refinement it has no gradient.
        """
        if step.number >= round(self.share * step.total):
            return z, None
        first, last = self.decay
        line = first + (last - first) * step.number / max(step.total - 1, 1)
        alpha = self.scale * sqrt(line)
        asked = {round(share * step.total): value for share, value in self.thresholds.items()}
        leaf, maps = step.forward(z)
        rest = stale(maps) if stale is not None else None
        if step.number in asked:
            target = max(0.0, 1 - asked[step.number])
            known, moves = float(refined(maps).detach()), 0
            while known > target and moves < self.most_refinements:
                loss = refined(maps)
                known = float(loss.detach())
                z, moves = z - alpha * step.gradient(loss, leaf), moves + 1
                leaf, maps = step.forward(z)
            if moves and rest is not None:
                rest = rest.detach()
        loss = energy(maps) if rest is None else energy(maps) + rest
        return z - alpha * step.gradient(loss, leaf), float(loss.detach())


@dataclass(frozen=True)
class AttendAndExcite:
    """The guide of one image."""

    targets: tuple[Target, ...]
    factor: int
    """latent cells per cell of the maps; the paper's is 4"""
    updates: RefinedUpdates = field(default_factory=RefinedUpdates)

    def __call__(self, z: Tensor, step: GuidanceStep) -> tuple[Tensor, float | None]:
        """See :class:`hcma_fast.bench.quality.methods.guidance.Guide`."""
        return self.updates.apply(z, step, self.energy, self.energy)

    def energy(self, maps: list[AttentionMap]) -> Tensor:
        """L of one forward pass, a scalar."""
        subjects = [target.head for target in self.targets]
        return attend_and_excite_loss(mean_map(maps, self.factor), subjects)


def attend_and_excite_loss(attention: Tensor, subjects: list[int]) -> Tensor:
    """L = max_s (1 - max(A^s)).

    Args:
        attention: (h, w, 77) mean cross-attention, sums over tokens are 1; h, w at least 2.
        subjects: positions of the subject tokens. Returns a scalar in [0, 1].
    """
    text = subject_maps(attention, subjects)
    return (1 - text.amax((1, 2))).amax()


def subject_maps(attention: Tensor, subjects: list[int]) -> Tensor:
    """A^s: softmax over the tokens without the start and the last, then a 3 x 3 Gaussian.

    Args:
        attention: (h, w, 77); subjects: S positions. Returns (S, h, w).
    """
    text = (attention[..., 1:-1] * _SHARPNESS).softmax(-1)
    chosen = text[..., [position - 1 for position in subjects]].movedim(-1, 0)
    padded = F.pad(chosen.unsqueeze(1), (1, 1, 1, 1), mode="reflect")
    # the code of the paper divides by (2 sigma)^2 where a Gaussian has 2 sigma^2
    offsets = torch.arange(-1, 2, dtype=attention.dtype, device=attention.device)
    line = torch.exp(-((offsets / (2 * _SIGMA)) ** 2))
    kernel = torch.outer(line, line)
    return F.conv2d(padded, (kernel / kernel.sum()).expand(1, 1, 3, 3)).squeeze(1)
