"""Cross-attention maps of the plain UNet, with gradients: what the peers' losses are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from hcma_fast.errors import UsageError
from hcma_fast.models.unet import PlainUNet

Place = Literal["down", "mid", "up"]


@dataclass(frozen=True)
class AttentionMap:
    """Cross-attention of one layer for one image."""

    probabilities: Tensor
    """(heads, h, w, 77), each cell's sum over the tokens is 1"""
    place: Place
    block: int
    """index among the down or up blocks that have attention; 0 for mid"""
    factor: int
    """latent cells per cell of the map, along a side"""


Energy = Callable[[list[AttentionMap]], Tensor]
"""From the maps of one forward pass to a scalar loss"""


@dataclass
class Passes:
    """Passes through the UNet that guidance took, counted for one image each."""

    forward: int = 0
    backward: int = 0


class AttentionUNet:
    """A copy of the UNet without its gated layers that shares all weights and hands out its maps.

    The copy's layers compute attention by a fused kernel that keeps no map, so a hook computes the
    map beside it, from the same queries and keys.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.plain = PlainUNet(unet).eval()
        self.passes = Passes()
        self._found: list[AttentionMap] = []
        self._sides = (0, 0)
        places: dict[str, list[int]] = {"down": [], "mid": [], "up": []}
        for name, module in self.plain.unet.named_modules():
            if not isinstance(module, BasicTransformerBlock):
                continue
            # down_blocks.1.attentions.0..., mid_block.attentions.0..., up_blocks.0.attentions.1...
            first, number = name.split(".")[:2]
            place = cast(Place, first.split("_")[0])
            index = int(number) if place != "mid" else 0
            if index not in places[place]:
                places[place].append(index)
            record = partial(self._record, place, places[place].index(index))
            module.attn2.register_forward_pre_hook(record, with_kwargs=True)

    def _record(
        self,
        place: Place,
        block: int,
        attention: Any,
        arguments: tuple[Tensor, ...],
        options: dict[str, Any],
    ) -> None:
        key = options["encoder_hidden_states"][2 * attention.index]
        query, key = (
            x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for x in (attention.to_q(arguments[0]), key)
        )
        shares = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        height, width = self._sides
        factor = round((height * width / shares.shape[2]) ** 0.5)
        shares = shares[0].unflatten(1, (height // factor, width // factor))
        self._found.append(AttentionMap(shares, place, block, factor))

    def maps(self, z: Tensor, timestep: Tensor, text_context: Tensor) -> list[AttentionMap]:
        """One forward pass.

        Args:
            z: (1, 4, h, w); timestep: (1,); text_context: (1, 77, W) of the caption's half.
        """
        self._found, self._sides = [], (int(z.shape[2]), int(z.shape[3]))
        self.passes.forward += 1
        self.plain(z, timestep, text_context)
        found, self._found = self._found, []
        return found


def attention_factors(unet: UNet2DConditionModel) -> list[int]:
    """Latent cells per cell of a map, for every resolution that has cross-attention."""
    depth = len(unet.config.block_out_channels)
    down, up = unet.config.down_block_types, unet.config.up_block_types
    factors = {2**i for i, kind in enumerate(down) if "CrossAttn" in kind}
    factors |= {2 ** (depth - 1 - i) for i, kind in enumerate(up) if "CrossAttn" in kind}
    if "CrossAttn" in unet.config.mid_block_type:
        factors.add(2 ** (depth - 1))
    return sorted(factors)


def choose_factor(unet: UNet2DConditionModel, wanted: int | None) -> int:
    """The resolution of attention to use: ``wanted``, or the papers' if the UNet has it.

    The papers' is 16 x 16 of a 64 x 64 latent, factor 4. A UNet without it, such as that of
    `tiny`, has its coarsest one taken.

    Raises:
        UsageError: the UNet has no attention at ``wanted``.
    """
    there = attention_factors(unet)
    if wanted is None:
        return 4 if 4 in there else there[-1]
    if wanted not in there:
        raise UsageError(
            "the UNet has no cross-attention at this factor",
            value=wanted,
            remedy=f"It has factors {', '.join(map(str, there))}.",
        )
    return wanted


def mean_map(maps: list[AttentionMap], factor: int) -> Tensor:
    """Mean over heads and layers of all maps at ``factor``: (h, w, 77)."""
    layers = [layer.probabilities for layer in maps if layer.factor == factor]
    total = sum(layer.sum(0) for layer in layers)
    return cast(Tensor, total) / sum(len(layer) for layer in layers)
