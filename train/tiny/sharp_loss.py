"""A reconstruction loss that wants edges: colours, gradients, and fixed random features.

L1 and squares alone are content with soft edges, of which small figures consist. Networks that
were trained on photographs (LPIPS) would be a download; random convolutions see edges and corners
too, and cost little.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTHS = (3, 16, 32, 48)
_SEED = 0


def reconstruction_loss(output: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """L1 + 4 MSE, and the MSE, of pictures of the same shape."""
    mse, l1 = (output - images).square().mean(), (output - images).abs().mean()
    return l1 + 4 * mse, mse


def gradient_loss(output: Tensor, images: Tensor) -> Tensor:
    """L1 of the differences between neighbouring pixels, down and across, (B, C, H, W)."""
    error = output - images
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


class RandomFeatures(nn.Module):
    """Three convolutions with fixed random filters, at whole, half and quarter resolution.

    The filters are the same in every run. Those of the first layer have mean 0: flat areas give
    nothing, whatever their colour.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(_SEED)
        for layer, (before, after) in enumerate(pairwise(_WIDTHS)):
            filters = torch.randn(after, before, 3, 3, generator=generator)
            if layer == 0:
                filters -= filters.mean((2, 3), keepdim=True)
            # variance of a ReLU network's features stays as it is
            filters *= (2 / (9 * before)) ** 0.5
            self.register_buffer(f"filters_{layer}", filters)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> features (B, 16, H, W), (B, 32, H/2, W/2), (B, 48, H/4, W/4)."""
        features, levels = images, []
        for layer in range(len(_WIDTHS) - 1):
            filters = self.get_buffer(f"filters_{layer}")
            features = F.relu(F.conv2d(features, filters, stride=2 if layer else 1, padding=1))
            levels.append(features)
        return levels

    def distance(self, output: Tensor, images: Tensor) -> Tensor:
        """Mean absolute difference of the features, a scalar."""
        with torch.no_grad():
            targets = self(images)
        pairs = zip(self(output), targets, strict=True)
        return torch.stack([(seen - wanted).abs().mean() for seen, wanted in pairs]).mean()


class SharpLoss(nn.Module):
    """L1 + 4 MSE + half the gradients' L1 + the distance of random features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = RandomFeatures()

    def forward(self, output: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the MSE, of pictures (B, 3, H, W)."""
        loss, mse = reconstruction_loss(output, images)
        loss = loss + 0.5 * gradient_loss(output, images)
        return loss + self.features.distance(output, images), mse
