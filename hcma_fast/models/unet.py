"""diffusers' gated UNet as the graphs `grounding`, `unet_grounded` and `unet_plain`.

Keys and values of the caption and of the boxes do not depend on the latent. `grounding` computes
those of all attention layers once per image, as two tensors with the layers side by side; the
UNet graphs, which run at every step, take them as inputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from hcma_fast.models.aligner import Aligner

KeyValues = tuple[Tensor, ...]
"""Key and value of each transformer block in turn, (B, T, C) each"""


def attention_blocks(unet: UNet2DConditionModel) -> list[Any]:
    """The transformer blocks with cross-attention, in the order that the contexts have."""
    return [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]


def context_widths(unet: UNet2DConditionModel) -> list[int]:
    """Widths of all keys and values that lie side by side in a context: key, value, key, ..."""
    return [block.attn2.to_k.out_features for block in attention_blocks(unet) for _ in range(2)]


class Grounding(nn.Module):
    """All that depends on texts and layout alone, for one half of the guidance.

    Args:
        aligner: None gives no region map.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        aligner: Aligner | None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        blocks = attention_blocks(unet)
        self.position_net: Any = unet.position_net
        self.caption_layers = nn.ModuleList(block.attn2 for block in blocks)
        self.box_layers = nn.ModuleList(block.fuser for block in blocks)
        self.aligner = aligner

    def forward(
        self,
        boxes: Tensor,
        region_mask: Tensor,
        label_embeddings: Tensor,
        encoder_hidden_states: Tensor,
    ) -> tuple[Tensor, ...]:
        """Positions net, keys and values, region map.

        Args:
            boxes: (B, M, 4); region_mask: (B, M); label_embeddings: (B, M, d);
            encoder_hidden_states: (B, 77, d).
        Returns:
            text_context (B, 77, W), grounding_context (B, M, W), regions (B, M, N), where W is
            the sum of :func:`context_widths`.
        """
        # diffusers makes the frequencies of its Fourier features on torch's default device
        with boxes.device:
            tokens = self.position_net(
                boxes=boxes, masks=region_mask, positive_embeddings=label_embeddings
            )
        objects: list[Tensor] = []
        layer: Any
        for layer in self.box_layers:
            # LayerNorm works token by token: the boxes' tokens may have it before they are joined
            normed = layer.norm1(layer.linear(tokens))
            objects += [layer.attn.to_k(normed), layer.attn.to_v(normed)]
        contexts = (
            _text_context(self.caption_layers, encoder_hidden_states),
            torch.cat(objects, -1),
        )
        if self.aligner is None:
            return contexts
        return *contexts, self.aligner.region_map(boxes, region_mask, self.grid)


class CaptionRegions(nn.Module):
    """The `grounding` graph of a UNet without gated attention: the aligner alone reads boxes."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        aligner: Aligner,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.aligner = grid, aligner
        self.caption_layers = nn.ModuleList(block.attn2 for block in attention_blocks(unet))

    def forward(
        self, boxes: Tensor, region_mask: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, M, 4), (B, M), (B, 77, d) -> text_context (B, 77, W), regions (B, M, N)."""
        regions = self.aligner.region_map(boxes, region_mask, self.grid)
        return _text_context(self.caption_layers, encoder_hidden_states), regions


class CaptionContext(nn.Module):
    """The `grounding` graph of a model that reads no boxes."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.caption_layers = nn.ModuleList(block.attn2 for block in attention_blocks(unet))

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        """(B, 77, d) -> text_context (B, 77, W)."""
        return (_text_context(self.caption_layers, encoder_hidden_states),)


def grounding_graph(
    unet: UNet2DConditionModel, aligner: Aligner | None, grid: tuple[int, int] | None
) -> nn.Module:
    """The `grounding` graph of any model."""
    if unet.config.attention_type == "gated":
        return Grounding(unet, aligner, grid)
    return CaptionContext(unet) if aligner is None else CaptionRegions(unet, aligner, grid)


def _text_context(layers: nn.ModuleList, encoder_hidden_states: Tensor) -> Tensor:
    caption: list[Tensor] = []
    layer: Any
    for layer in layers:
        caption += [layer.to_k(encoder_hidden_states), layer.to_v(encoder_hidden_states)]
    return torch.cat(caption, -1)


class GroundedUNet(nn.Module):
    """The UNet with gated attention over the boxes (GLIGEN, Eq. 8), on precomputed contexts."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = _on_contexts(unet, gated=True)
        self.widths = context_widths(unet)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text_context: Tensor,
        grounding_context: Tensor,
        grounding_gate: Tensor | None = None,
    ) -> tuple[Tensor]:
        """One evaluation.

        Args:
            sample: (B, 4, h, w); timestep: (B,); text_context: (B, 77, W); grounding_context:
                (B, M, W).
            grounding_gate: (B,) factor of the gated layers: 1 as they were trained (None too), 0
                for the result of :class:`PlainUNet`.
        Returns:
            noise prediction (B, 4, h, w) float32.
        """
        dtype = self.unet.conv_in.weight.dtype
        given = {
            "objs": grounding_context.to(dtype).split(self.widths, dim=-1),
            "gate": None if grounding_gate is None else grounding_gate.to(dtype).view(-1, 1, 1),
        }
        return _predict(self.unet, self.widths, sample, timestep, text_context, given)


class PlainUNet(nn.Module):
    """The same UNet without its gated layers: exact, since a residual branch is left out."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = _on_contexts(unet, gated=False)
        self.widths = context_widths(unet)

    def forward(self, sample: Tensor, timestep: Tensor, text_context: Tensor) -> tuple[Tensor]:
        """(B, 4, h, w), (B,), (B, 77, W) -> noise prediction (B, 4, h, w) float32."""
        return _predict(self.unet, self.widths, sample, timestep, text_context, None)


def _predict(
    unet: Any,
    widths: list[int],
    sample: Tensor,
    timestep: Tensor,
    text_context: Tensor,
    gligen: dict[str, Any] | None,
) -> tuple[Tensor]:
    dtype = unet.conv_in.weight.dtype
    # diffusers hands both on to the attention layers without a look at them
    noise = unet(
        sample.to(dtype),
        timestep,
        text_context.to(dtype).split(widths, dim=-1),
        cross_attention_kwargs=None if gligen is None else {"gligen": gligen},
        return_dict=False,
    )[0]
    return (noise.float(),)


def _on_contexts(unet: UNet2DConditionModel, *, gated: bool) -> Any:
    """A copy that shares every weight, whose attention layers take keys and values as they are."""
    shared = {id(value): value for value in (*unet.parameters(), *unet.buffers())}
    copied = copy.deepcopy(unet, shared)
    copied.position_net = _GroundingTokens()
    for index, block in enumerate(attention_blocks(copied)):
        block.attn2 = _CaptionAttention(block.attn2, index)
        block.fuser = _GatedAttention(block.fuser, index) if gated else None
        block.ff.net[0] = _SplitGEGLU(block.ff.net[0])
        if gated:
            block.fuser.ff.net[0] = _SplitGEGLU(block.fuser.ff.net[0])
    return copied


class _GroundingTokens(nn.Module):
    """Stands where the UNet expects its position net, once that has run outside."""

    def forward(self, objs: KeyValues, gate: Tensor | None) -> tuple[KeyValues, Tensor | None]:
        return objs, gate


class _CaptionAttention(nn.Module):
    """Cross-attention of block ``index``, with the caption's keys and values given."""

    def __init__(self, attention: Any, index: int) -> None:
        super().__init__()
        self.to_q, self.to_out, self.heads = attention.to_q, attention.to_out, attention.heads
        self.index = index

    def forward(
        self, hidden: Tensor, encoder_hidden_states: KeyValues, attention_mask: None = None
    ) -> Tensor:
        key, value = encoder_hidden_states[2 * self.index : 2 * self.index + 2]
        return self.to_out[0](_attend(self.to_q(hidden), key, value, self.heads))  # type: ignore[no-any-return]


class _GatedAttention(nn.Module):
    """GLIGEN's gated self-attention of block ``index``, with the boxes' keys and values given.

    The boxes' tokens are asked by the image's, but ask nothing themselves: what diffusers computes
    for them and throws away is left out.
    """

    def __init__(self, fuser: Any, index: int) -> None:
        super().__init__()
        attention = fuser.attn
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out, self.heads = attention.to_out, attention.heads
        self.ff, self.norm1, self.norm2 = fuser.ff, fuser.norm1, fuser.norm2
        self.alpha_attn, self.alpha_dense = fuser.alpha_attn, fuser.alpha_dense
        self.index = index

    def forward(self, hidden: Tensor, given: tuple[KeyValues, Tensor | None]) -> Tensor:
        """(B, T, C), the keys and values of all blocks, a gate (B, 1, 1) or None -> (B, T, C)."""
        objects, gate = given
        normed = self.norm1(hidden)
        box_key, box_value = objects[2 * self.index : 2 * self.index + 2]
        gates = [self.alpha_attn.tanh(), self.alpha_dense.tanh()]
        if gate is not None:
            gates = [trained * gate for trained in gates]
        key = torch.cat([self.to_k(normed), box_key], 1)
        value = torch.cat([self.to_v(normed), box_value], 1)
        attended = self.to_out[0](_attend(self.to_q(normed), key, value, self.heads))
        hidden = hidden + gates[0] * attended
        return hidden + gates[1] * self.ff(self.norm2(hidden))  # type: ignore[no-any-return]


class _SplitGEGLU(nn.Module):
    """diffusers' GEGLU with a product for each half of its weight, so that no result is cut in two.

    On ONNX Runtime's CPU cutting took a quarter as long as the product (bench of 2026-11-25).
    """

    def __init__(self, geglu: Any) -> None:
        super().__init__()
        weights, biases = geglu.proj.weight.chunk(2), geglu.proj.bias.chunk(2)
        self.weight, self.gate_weight = (nn.Parameter(part, False) for part in weights)
        self.bias, self.gate_bias = (nn.Parameter(part, False) for part in biases)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = F.gelu(F.linear(hidden, self.gate_weight, self.gate_bias))
        return F.linear(hidden, self.weight, self.bias) * gate


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention: (B, T, C), (B, S, C), (B, S, C) -> (B, T, C)."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
