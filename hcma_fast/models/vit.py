"""The aligner's Vision Transformer over latent patches.

Paper section 3.3, "Latent Feature Extraction".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcma_fast.config import AlignerConfig
from hcma_fast.errors import UsageError


def timestep_features(timestep: Tensor, width: int) -> Tensor:
    """Sinusoidal features of (B,) timesteps: (B, width) float32 (DDPM's, base 10000)."""
    half = width // 2
    exponents = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
    angles = timestep.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention on (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # chunk, whose backward is one concatenation, and not a permutation of all three
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(tokens).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block; ``time_width`` adds modulation by time (adaLN-zero, DiT)."""

    def __init__(self, width: int, heads: int, time_width: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(time_width, 6 * width) if time_width else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, time: Tensor | None) -> Tensor:
        if self.modulation is None or time is None:
            tokens = tokens + self.attention(self.norm1(tokens))
            return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(F.silu(time)).unsqueeze(1).chunk(6, dim=-1)
        )
        tokens = tokens + gate1 * self.attention(self.norm1(tokens) * (1 + scale1) + shift1)
        return tokens + gate2 * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


class LatentViT(nn.Module):
    """Latent -> one global and N local features.

    Patches are cut by reshape, never by Conv2d: a convolution's backward has no ONNX form.
    """

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        patch_values = config.latent_channels * config.patch_size**2
        time_width = config.width if config.time_conditioning == "adaln" else 0
        self.project = nn.Linear(patch_values, config.token_width)
        self.embed = nn.Sequential(
            nn.Linear(config.token_width, config.width),
            nn.GELU(),
            nn.Linear(config.width, config.width),
        )
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.time = (
            nn.Sequential(nn.Linear(64, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
            if time_width
            else None
        )
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, time_width) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        for parameter in (self.cls, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def patchify(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, (h/p)(w/p), C p p), rows first."""
        size = self.config.patch_size
        batch, channels, height, width = z.shape
        cells = z.reshape(batch, channels, height // size, size, width // size, size)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(
            batch, (height // size) * (width // size), channels * size * size
        )

    def positions_for(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, 1 + rows * columns, width), resampled for another grid."""
        grid = self.config.grid
        if (rows, columns) == (grid, grid):
            return self.positions
        cls, cells = self.positions[:, :1], self.positions[:, 1:]
        square = cells.transpose(1, 2).reshape(1, -1, grid, grid)
        resampled = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([cls, resampled.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, z: Tensor, timestep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, C, h, w) noise-scaled latent -> Z^G (B, d_v), Z^L (B, N, d_v), as the weights."""
        size, dtype = self.config.patch_size, self.project.weight.dtype
        tokens = self.embed(self.project(self.patchify(z).to(dtype)))
        tokens = torch.cat([self.cls.expand(z.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + self.positions_for(z.shape[2] // size, z.shape[3] // size)
        time = None
        if self.time is not None:
            if timestep is None:
                raise UsageError(
                    "an aligner with time conditioning needs the timestep",
                    remedy="Pass timestep (B,), or train with time_conditioning='none'.",
                )
            time = self.time(timestep_features(timestep, 64).to(dtype))
        for block in self.blocks:
            tokens = block(tokens, time)
        # split rather than two slices, for the same reason as in Attention
        image, cells = self.norm(tokens).split([1, tokens.shape[1] - 1], dim=1)
        return image.squeeze(1), cells
