"""A graph's module with channels last, the layout that a GPU's convolutions in half take.

In torch's own layout (NCHW) every convolution on tensor cores begins and ends with a copy that
turns the image around. Weights are turned once here; activations follow them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from hcma_fast.export.precision import Float32Norm


def channels_last(module: nn.Module) -> nn.Module:
    """``module`` itself, changed in place: weights of convolutions, and what turns images around.

    That is ``nn.GroupNorm`` on a GPU, and diffusers' transformer of an image. Their substitutes
    agree within rounding.
    """
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            # the data alone: another graph may share the weight
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last)
    _replace(module)
    return module


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm) or (isinstance(child, Float32Norm) and child.groups):
            setattr(module, name, ChannelsLastGroupNorm(child))
            continue
        _replace(child)
        if isinstance(child, Transformer2DModel):
            setattr(module, name, ChannelsLastTransformer(child))


class ChannelsLastTransformer(nn.Module):
    """diffusers' transformer over an image's cells, without its ``contiguous()`` at the end.

    Its 1 x 1 convolutions are products of the tokens here, which is the same arithmetic.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm, self.blocks = transformer.norm, transformer.transformer_blocks
        self.proj_in, self.proj_out = transformer.proj_in, transformer.proj_out

    def forward(
        self,
        hidden: Tensor,
        encoder_hidden_states: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
        **masks: None,
    ) -> tuple[Tensor]:
        """(B, C, h, w) -> (B, C, h, w); other arguments as diffusers passes them to the blocks."""
        batch, channels, height, width = hidden.shape
        tokens = self.norm(hidden).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        tokens = _as_product(self.proj_in, tokens)
        for block in self.blocks:
            tokens = block(
                tokens,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
            )
        tokens = _as_product(self.proj_out, tokens)
        return (tokens.reshape(batch, height, width, channels).permute(0, 3, 1, 2) + hidden,)


def _as_product(layer: nn.Conv2d | nn.Linear, tokens: Tensor) -> Tensor:
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class ChannelsLastGroupNorm(nn.Module):
    """GroupNorm in float32 that leaves (B, C, h, w) in the layout in which it came."""

    def __init__(self, norm: nn.GroupNorm | Float32Norm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.groups

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if x.dim() != 4:
            return F.group_norm(x.float(), self.groups, weight, bias, self.eps).to(x.dtype)
        batch, channels, height, width = x.shape
        # (B, pixels, groups, channels of a group): a view of what has its channels last
        grouped = x.permute(0, 2, 3, 1).reshape(batch, height * width, self.groups, -1)
        count = height * width * (channels // self.groups)
        # both read the half precision values and sum in float32, without a wide copy of x
        mean = grouped.sum((1, 3), dtype=torch.float32) / count
        length = torch.linalg.vector_norm(grouped, 2, (1, 3), dtype=torch.float32)
        spread = (length.square() / count - mean.square()).clamp(min=0) + self.eps
        scale = spread.rsqrt().repeat_interleave(channels // self.groups, 1)
        shift = -mean.repeat_interleave(channels // self.groups, 1) * scale
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        if bias is not None:
            shift = shift + bias
        return torch.addcmul(shift[..., None, None], x, scale[..., None, None]).to(x.dtype)
