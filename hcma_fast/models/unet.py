"""diffusers' gated UNet as the graphs `unet_grounded`, `unet_plain` and `grounding`."""

from __future__ import annotations

import copy

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hcma_fast.models.aligner import Aligner


class _GroundingTokens(nn.Module):
    """Stands where the UNet expects its position net, once the tokens are computed outside."""

    def forward(self, objs: Tensor) -> Tensor:
        return objs


class GroundedUNet(nn.Module):
    """The UNet with gated attention over precomputed grounding tokens (GLIGEN, Eq. 8)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        # a shallow copy shares every weight; only the slot of the position net differs
        shared = copy.copy(unet)
        shared._modules = {**unet._modules, "position_net": _GroundingTokens()}
        self.unet = shared

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        grounding_tokens: Tensor,
    ) -> tuple[Tensor]:
        """(B, 4, h, w), (B,), (B, 77, d), (B, M, d) -> noise prediction (B, 4, h, w)."""
        gligen = {"objs": grounding_tokens}
        output = self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            cross_attention_kwargs={"gligen": gligen},
            return_dict=False,
        )
        return (output[0],)


class PlainUNet(nn.Module):
    """The same UNet without its gated layers: exact, since a residual branch is left out."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor]:
        """(B, 4, h, w), (B,), (B, 77, d) -> noise prediction (B, 4, h, w)."""
        return (self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


class Grounding(nn.Module):
    """All that depends on the layout alone: GLIGEN's tokens and the aligner's region map."""

    def __init__(self, unet: UNet2DConditionModel, aligner: Aligner) -> None:
        super().__init__()
        self.position_net = unet.position_net
        self.aligner = aligner

    def forward(
        self, boxes: Tensor, region_mask: Tensor, label_embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, M, 4), (B, M), (B, M, d) -> grounding tokens (B, M, d), regions (B, M, N)."""
        tokens = self.position_net(
            boxes=boxes, masks=region_mask, positive_embeddings=label_embeddings
        )
        return tokens, self.aligner.region_map(boxes, region_mask)
