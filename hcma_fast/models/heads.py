"""The two heads of the aligner: caption-to-image (C2IA) and object-to-region (O2RA)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcma_fast.config import AlignerConfig
from hcma_fast.models.regions import FOURIER_WIDTH, cell_coverage, fourier_embed

Pool = Callable[[Tensor, Tensor], Tensor]


class CaptionHead(nn.Sequential):
    """C2IA: three-layer MLP from Z^G (B, d_v) to f^G (B, d_t) (paper section 3.3.1)."""

    def __init__(self, config: AlignerConfig) -> None:
        width = config.width
        super().__init__(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, config.text_width),
        )


class RegionHead(nn.Module):
    """O2RA: weighted mean of Z^L over a box's cells, then an MLP to f^L (paper section 3.3.2)."""

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.project = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.text_width)
        )
        self.gate: nn.Sequential | None = None
        if "fourier" in config.region:
            last = nn.Linear(width, config.grid**2)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.gate = nn.Sequential(nn.Linear(FOURIER_WIDTH, width), nn.SiLU(), last)

    def region_map(
        self, boxes: Tensor, mask: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """B_i(n) for each box and cell; 0 for masked boxes.

        The gate has one value per box *and cell*: a single value per box would cancel in the mean.

        Args:
            boxes: (B, M, 4) xyxy in [0, 1]; mask: (B, M).
            grid: rows and columns; default those of the latent that the gate was trained at. Its
            values are interpolated (bilinear) for any other.
        Returns:
            (B, M, N), not negative.
        """
        trained = self.config.grid
        rows, columns = grid or (trained, trained)
        weights = torch.ones(
            (*boxes.shape[:2], rows * columns), dtype=boxes.dtype, device=boxes.device
        )
        if "coverage" in self.config.region:
            weights = cell_coverage(boxes, rows, columns)
        if self.gate is not None:
            gate = 2 * torch.sigmoid(self.gate(fourier_embed(boxes)))
            if (rows, columns) != (trained, trained):
                square = gate.unflatten(-1, (trained, trained))
                gate = F.interpolate(square, (rows, columns), mode="bilinear").flatten(-2)
            weights = weights * gate
        return weights * mask.unsqueeze(-1)

    def forward(self, local: Tensor, regions: Tensor, pool: Pool | None = None) -> Tensor:
        """local (B, N, d_v), regions (B, M, N) -> f^L (B, M, d_l).

        Args:
            pool: what computes the means (B, M, d_v); None for :func:`mean_over_boxes`.
        """
        return self.project((pool or mean_over_boxes)(local, regions))  # type: ignore[no-any-return]


def mean_over_boxes(local: Tensor, regions: Tensor) -> Tensor:
    """sum_n B_i(n) Z_n / sum_n B_i(n): (B, N, d_v), (B, M, N) -> (B, M, d_v) (section 3.3.2)."""
    total = regions.sum(-1, keepdim=True)
    # an empty row stays zero: its weight is 0 and its denominator 1
    weights = regions / torch.where(total > 0, total, torch.ones_like(total))
    return weights.to(local.dtype) @ local
