"""Region maps: how boxes lie on the token grid, and the Fourier features of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

FOURIER_FREQUENCIES = 8
FOURIER_WIDTH = 4 * 2 * FOURIER_FREQUENCIES


def _axis_overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Share of each of ``cells`` equal cells of [0, 1] that [low, high] covers: (..., cells)."""
    edges = torch.arange(cells + 1, device=low.device, dtype=low.dtype) / cells
    right = torch.minimum(high.unsqueeze(-1), edges[1:])
    left = torch.maximum(low.unsqueeze(-1), edges[:-1])
    return (right - left).clamp(min=0) * cells


def cell_coverage(boxes: Tensor, grid_height: int, grid_width: int) -> Tensor:
    """Exact share of each grid cell that a box covers.

    Args:
        boxes: (B, M, 4) xyxy in [0, 1]. Returns (B, M, grid_height * grid_width) in [0, 1]; a box
        smaller than a cell still has its (small) coverage.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    rows = _axis_overlap(y0, y1, grid_height)
    columns = _axis_overlap(x0, x1, grid_width)
    return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)


def fourier_embed(boxes: Tensor) -> Tensor:
    """GLIGEN's Fourier features: sin and cos at 100^(k/8), k = 0..7, of the four coordinates.

    Args:
        boxes: (B, M, 4). Returns (B, M, 64).
    """
    exponents = torch.arange(FOURIER_FREQUENCIES, device=boxes.device, dtype=boxes.dtype)
    angles = boxes.unsqueeze(-1) * 100 ** (exponents / FOURIER_FREQUENCIES)
    # GLIGEN's order: frequency, then sine and cosine, then coordinate
    return torch.stack([angles.sin(), angles.cos()], dim=-1).movedim(-3, -1).flatten(-3)
