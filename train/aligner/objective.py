"""What is drawn for a step, the objective of stage 1 (paper Algorithm 1), and the logs' figures.

A loss alone would not tell an aligner that reads the latent from one that predicts the mean
embedding, so retrieval is measured too: is the own caption, or label, the nearest of all? Whoever
predicts the mean is right as often as chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcma_fast.losses import global_loss, local_loss, local_mean
from hcma_fast.models.aligner import Aligner
from hcma_fast.schedule import TRAIN_STEPS, add_noise
from hcma_fast.seeds import seeded_generator
from hcma_fast.train.data.latent_cache import Batch

BUCKETS = 10
"""Of the timesteps, 100 each"""
QUANTITIES = ("global", "local", "caption_r1", "region_r1")
_SAME = 1 - 1e-5
"""Cosine from which on two embeddings are those of the same text"""


class AlignerFeatures(nn.Module):
    """The aligner from latent and boxes to features, as one forward: DDP wants it so."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(
        self, z: Tensor, boxes: Tensor, mask: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z (B, C, h, w), boxes (B, M, 4), mask (B, M), timesteps (B,) -> f^G (B, d), f^L
        (B, M, d)."""
        regions = self.aligner.region_map(boxes, mask)
        return self.aligner.features(z, regions, timesteps)


@dataclass(frozen=True)
class Noised:
    """A batch on its device with its latents drawn and noised."""

    batch: Batch
    z: Tensor
    """(B, C, h, w) float32"""
    timesteps: Tensor
    """(B,) int64"""
    noise: Tensor
    """(B, C, h, w) float32, what was added"""


def draw_noised(
    batch: Batch, scaling_factor: float, seed: int, timesteps: Tensor | None = None
) -> Noised:
    """Draw z_0 from the VAE's posteriors, t uniformly, and z_t by q_sample, all from ``seed``.

    Args:
        timesteps: (B,) int64, to be used instead of drawn ones.
    """
    device, shape = batch.mean.device, batch.mean.shape
    generator = seeded_generator(seed, device)
    posterior_noise = torch.randn(shape, generator=generator, device=device)
    noise = torch.randn(shape, generator=generator, device=device)
    if timesteps is None:
        timesteps = torch.randint(0, TRAIN_STEPS, (shape[0],), generator=generator, device=device)
    z0 = (batch.mean.float() + batch.std.float() * posterior_noise) * scaling_factor
    return Noised(batch, add_noise(z0, noise, timesteps), timesteps, noise)


def stage1_losses(
    network: nn.Module, noised: Noised, label_table: Tensor, *, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """Omega^G + Omega^L of each image (B,), and statistics to add up, (4, 2, 10).

    The losses are per image, so that the mean over any number of equal parts of a batch is the mean
    over the batch.

    Args:
        network: an :class:`AlignerFeatures`, or DDP around one.
        label_table: (L, d) embeddings that ``labels`` of the batch index.
    Returns:
        The statistics hold, per quantity of :data:`QUANTITIES` and bucket of t, sum and count:
        images for ``global`` and ``caption_r1``, images with boxes for ``local``, boxes for
        ``region_r1``.
    """
    batch, mask = noised.batch, noised.batch.mask
    with torch.autocast(noised.z.device.type, torch.bfloat16, enabled=bf16):
        f_global, f_local = network(noised.z, batch.boxes, mask, noised.timesteps)
    f_global, f_local = f_global.float(), f_local.float()
    labels = label_table[batch.labels]
    omega_global = global_loss(f_global, batch.caption)
    omega_local = local_mean(local_loss(f_local, labels, mask), mask)
    with torch.no_grad():
        every = torch.ones_like(omega_global)
        captions_right = retrieved(f_global, batch.caption, batch.caption)
        regions_right = retrieved(f_local, labels, label_table) * mask
        values = (omega_global, omega_local, captions_right, regions_right.sum(1))
        counts = (every, (mask.sum(1) > 0).float(), every, mask.sum(1))
        statistics = by_bucket(values, counts, noised.timesteps)
    return omega_global + omega_local, statistics


def by_bucket(values: Sequence[Tensor], counts: Sequence[Tensor], timesteps: Tensor) -> Tensor:
    """Sums of values and counts per bucket of t: Q of each (B,), timesteps (B,) -> (Q, 2, 10)."""
    bucket = timesteps * BUCKETS // TRAIN_STEPS
    statistics = torch.zeros(len(values), 2, BUCKETS, device=timesteps.device)
    for row, (value, count) in enumerate(zip(values, counts, strict=True)):
        statistics[row, 0].index_add_(0, bucket, value.float())
        statistics[row, 1].index_add_(0, bucket, count)
    return statistics


def retrieved(features: Tensor, targets: Tensor, table: Tensor) -> Tensor:
    """1 where the nearest of ``table``, by cosine, is the feature's own target, else 0.

    Args:
        features, targets: (..., d); table: (L, d), which holds every target. Equal embeddings in
        it, of captions that occur twice, count as one. Returns (...) float32.
    """
    table = F.normalize(table, dim=-1)
    nearest = (F.normalize(features, dim=-1) @ table.T).argmax(-1)
    found = (table[nearest] * F.normalize(targets, dim=-1)).sum(-1)
    return (found > _SAME).float()


def means(statistics: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Means of :func:`by_bucket`'s sums: each quantity over all t, and per bucket (``*_by_t``);
    None where nothing was counted."""
    sums, counts = statistics.double().cpu().unbind(1)
    record: dict[str, Any] = {}
    for name, total, count in zip(names, sums, counts, strict=True):
        record[name] = _ratio(total.sum(), count.sum())
        record[f"{name}_by_t"] = [_ratio(t, c) for t, c in zip(total, count, strict=True)]
    return record


def summary(statistics: Tensor) -> dict[str, Any]:
    """:func:`means` of :func:`stage1_losses`' statistics; ``loss`` is the sum of both losses."""
    sums, counts = statistics.double().cpu().unbind(1)
    # both sums over all images: Omega^L of an image without boxes is 0
    loss = _ratio(sums[0].sum() + sums[1].sum(), counts[0].sum())
    return {"loss": loss, **means(statistics, QUANTITIES)}


def _ratio(total: Tensor, count: Tensor) -> float | None:
    return round(float(total / count), 6) if float(count) else None
