"""What a call of the pipeline gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hcma_fast.sampling.schedule import StepLosses


@dataclass(frozen=True)
class HCMAOutput:
    """Images and what it takes to make them again."""

    images: Any
    """by output type: list of PIL images; float array (B, H, W, 3) or tensor (B, 3, H, W) in
    [0, 1]; latents"""
    losses: list[StepLosses]
    """one entry per PLMS step that computes the alignment: none when eta0 = 0, outside the window,
    or where a gradient is repeated, unless ``savings`` says otherwise"""
    seeds: list[int]
    """one per image; empty when latents were given"""
    latents: Tensor
    """(B, 4, h, w) float32, the clean scaled latents"""
