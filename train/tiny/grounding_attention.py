"""Teach the gated layers where boxes are: supervision of their attention maps while training.

Trained from scratch on the noise loss alone, `tiny` learned what to draw from captions long before
it looked at boxes. So half of the heads of each gated layer are told to attend, from a cell of the
image, to the grounding tokens of the boxes that cover it, and to no other box (the localisation
loss of FastComposer, Xiao et al. 2023, arXiv:2305.10431, on GLIGEN's layers). The model is not
changed.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.models.regions import cell_coverage

_MIN_COVERAGE = 0.3
_FLOOR = 1e-3


class GroundingAttention:
    """Records, in every forward pass, how visual tokens attend to grounding tokens."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._shares: list[Tensor] = []
        for module in unet.modules():
            if isinstance(module, GatedSelfAttentionDense):
                module.attn.register_forward_pre_hook(self._record)

    def _record(self, attention: Any, arguments: tuple[Tensor, ...]) -> None:
        tokens = arguments[0]
        heads = attention.heads // 2
        query = attention.to_q(tokens[:, :-MAX_OBJECTS]).unflatten(-1, (attention.heads, -1))
        key = attention.to_k(tokens).unflatten(-1, (attention.heads, -1))
        logits = torch.einsum("bnhd,bmhd->bhnm", query[:, :, :heads], key[:, :, :heads])
        shares = (logits * attention.scale).softmax(-1)[..., -MAX_OBJECTS:]
        self._shares.append(shares.mean(1))

    def loss(self, boxes: Tensor, mask: Tensor) -> Tensor:
        """Mean over the gated layers of the last forward pass; a scalar, 0 without gated layers.

        Args:
            boxes: (B, M, 4) xyxy in [0, 1]; mask: (B, M).
        """
        shares, self._shares = self._shares, []
        losses = [localisation_loss(layer, boxes, mask) for layer in shares]
        return torch.stack(losses).mean() if losses else boxes.new_zeros(())


def localisation_loss(shares: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
    """-log of the attention to the boxes that cover a cell, and of what does not go astray.

    Args:
        shares: (B, N, M) attention of the N cells of a square grid to M boxes.
        boxes: (B, M, 4) xyxy in [0, 1]; mask: (B, M). Returns a scalar.
    """
    side = round(shares.shape[1] ** 0.5)
    valid = mask.unsqueeze(1)
    inside = (cell_coverage(boxes, side, side) > _MIN_COVERAGE).float().transpose(1, 2) * valid
    covered = inside.amax(-1)
    found = -((shares * inside).sum(-1) + _FLOOR).log() * covered
    astray = -(1 - (shares * (valid - inside)).sum(-1) + _FLOOR).clamp(max=1).log()
    return found.sum() / covered.sum().clamp(min=1) + astray.mean()
