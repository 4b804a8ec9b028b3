"""Where a layout's phrases stand in the caption: the tokens whose attention the peers move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from hcma_fast.errors import InputError
from hcma_fast.layout import Box, Layout


@dataclass(frozen=True)
class Target:
    """Tokens of the caption that name something, and every box of the layout that shows it."""

    tokens: tuple[int, ...]
    """positions in the 77 tokens, the start token is 0"""
    boxes: tuple[Box, ...]

    @property
    def head(self) -> int:
        """The phrase's last token: in English the noun ("sports ball"), for one map a target."""
        return self.tokens[-1]


def find_targets(
    tokenizer: CLIPTokenizer, caption: str, layout: Layout, mentions: Sequence[str] | None = None
) -> tuple[Target, ...]:
    """The targets of one image, in the order of the caption's first mention of each.

    Args:
        mentions: how the caption words each phrase ("zebras" for zebra); default the phrases.

    Raises:
        InputError: a mention is not in the caption. The papers give the tokens by hand.
    """
    words = [int(token) for token in tokenizer(caption).input_ids]
    boxes: dict[tuple[int, ...], list[Box]] = {}
    for mention, box in zip(mentions or layout.phrases, layout.boxes, strict=True):
        wanted = [int(token) for token in tokenizer(mention, add_special_tokens=False).input_ids]
        length = len(wanted)
        starts = [i for i in range(len(words) - length + 1) if words[i : i + length] == wanted]
        if not starts or not wanted:
            raise InputError(
                f"the caption {caption!r} does not mention a phrase of its layout",
                value=mention,
                remedy='Say how it does by "mentions", a text per box, or use a method that '
                "reads boxes (gligen, hcma).",
            )
        boxes.setdefault(tuple(range(starts[0], starts[0] + length)), []).append(box)
    return tuple(Target(tokens, tuple(some)) for tokens, some in sorted(boxes.items()))


def box_cells(box: Box, height: int, width: int, *, truncate: bool) -> tuple[int, int, int, int]:
    """A box in cells of a map, x0, y0, x1, y1, one cell or more; ends are rounded or truncated."""
    scaled = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    x0, y0, x1, y1 = (int(value) if truncate else round(value) for value in scaled)
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def box_mask(cells: Sequence[tuple[int, int, int, int]], like: Tensor) -> Tensor:
    """1 inside any of the boxes, 0 elsewhere: (h, w), with dtype and device of ``like``."""
    mask = torch.zeros_like(like, requires_grad=False)
    for x0, y0, x1, y1 in cells:
        mask[y0:y1, x0:x1] = 1
    return mask
