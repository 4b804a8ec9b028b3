"""BoxDiff (Xie et al. 2023, arXiv:2307.10816): attention of each subject fills its box and no more.

With A the smoothed map of a subject token and M its boxes' mask, the loss is the sum over subjects
of the inner-box constraint 1 - mean topk(A M), the outer-box constraint mean topk(A (1 - M)), and
the corner constraints |max-projection of A - that of M| near the boxes' edges, on both axes. The
latent moves by z' = z - alpha_t grad_z L, with Attend-and-Excite's alpha_t and refinement, which
follows the worst inner-box constraint. Constants are those of the published code. After a
refinement that code moves by the inner-box constraints alone: its outer-box and corner constraints
are still those of the latent before, and have no gradient. So it is here; the paper does not say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hcma_fast.bench.quality.methods.attend_and_excite import RefinedUpdates, subject_maps
from hcma_fast.bench.quality.methods.attention import AttentionMap, mean_map
from hcma_fast.bench.quality.methods.guidance import GuidanceStep
from hcma_fast.bench.quality.methods.targets import Target, box_cells, box_mask

_TOP_SHARE = 0.2
_CORNER_CELLS = 1


@dataclass(frozen=True)
class BoxDiff:
    """The guide of one image."""

    targets: tuple[Target, ...]
    factor: int
    """latent cells per cell of the maps; the paper's is 4"""
    updates: RefinedUpdates = field(default_factory=RefinedUpdates)

    def __call__(self, z: Tensor, step: GuidanceStep) -> tuple[Tensor, float | None]:
        """See :class:`hcma_fast.bench.quality.methods.guidance.Guide`."""
        return self.updates.apply(z, step, self.inner, self.worst_inner, self.outside)

    def energy(self, maps: list[AttentionMap]) -> Tensor:
        """The whole loss of one forward pass, a scalar."""
        return self.inner(maps) + self.outside(maps)

    def inner(self, maps: list[AttentionMap]) -> Tensor:
        """Sum of the inner-box constraints, a scalar."""
        return boxdiff_terms(mean_map(maps, self.factor), self.targets)[0].sum()

    def outside(self, maps: list[AttentionMap]) -> Tensor:
        """Sum of the outer-box and corner constraints, a scalar."""
        _, outer, corners = boxdiff_terms(mean_map(maps, self.factor), self.targets)
        return (outer + corners).sum()

    def worst_inner(self, maps: list[AttentionMap]) -> Tensor:
        """What refinement lowers: the largest inner-box constraint."""
        return boxdiff_terms(mean_map(maps, self.factor), self.targets)[0].amax()


def boxdiff_terms(attention: Tensor, targets: tuple[Target, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Inner-box, outer-box and corner constraints of each target, (S,) each.

    A subject with several boxes has their union for M, and the edges of all for corners; the
    paper has one box a subject. At least one cell counts as the top share, however small a box is.

    Args:
        attention: (h, w, 77) mean cross-attention.
    """
    maps = subject_maps(attention, [target.head for target in targets])
    height, width = maps.shape[1:]
    inner, outer, corners = [], [], []
    for subject, target in zip(maps, targets, strict=True):
        cells = [box_cells(box, height, width, truncate=False) for box in target.boxes]
        mask = box_mask(cells, subject)
        inner.append(1 - _top_mean(subject * mask, mask))
        outer.append(_top_mean(subject * (1 - mask), 1 - mask))
        terms = []
        for axis, size, ends in ((0, width, (0, 2)), (1, height, (1, 3))):
            near = torch.zeros(size, dtype=subject.dtype, device=subject.device)
            for box in cells:
                for edge in (box[ends[0]], box[ends[1]]):
                    near[max(edge - _CORNER_CELLS, 0) : edge + _CORNER_CELLS + 1] = 1
            terms.append(((subject.amax(axis) - mask.amax(axis)).abs() * near).mean())
        corners.append(terms[0] + terms[1])
    return torch.stack(inner), torch.stack(outer), torch.stack(corners)


def _top_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the largest values, as many as a fifth of the mask's cells."""
    count = max(int(float(mask.sum()) * _TOP_SHARE), 1)
    return values.flatten().topk(count).values.mean()
