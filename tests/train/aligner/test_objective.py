"""The objective of stage 1 and its statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hcma_fast.losses import global_loss, local_loss, local_mean
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.schedule import alphas_cumprod
from hcma_fast.train.aligner.objective import (
    BUCKETS,
    QUANTITIES,
    AlignerFeatures,
    draw_noised,
    retrieved,
    stage1_losses,
    summary,
)
from hcma_fast.train.data.latent_cache import LatentCache


@pytest.fixture
def cache(small_cache: Path) -> LatentCache:
    return LatentCache(small_cache)


def test_retrieval_counts_the_own_target_only() -> None:
    table = torch.eye(4)
    own = torch.tensor([0, 1, 2, 3])
    assert retrieved(3 * table[own], table[own], table).tolist() == [1, 1, 1, 1]
    assert retrieved(table[[0, 3, 2, 1]], table[own], table).tolist() == [1, 0, 1, 0]
    # whoever says the mean is right as often as chance
    assert retrieved(torch.ones(4, 4), table[own], table).sum() == 1
    # texts that occur twice are each other's equals
    twice = table[[0, 1, 1, 2]]
    assert retrieved(twice, twice, twice).tolist() == [1, 1, 1, 1]


def test_q_sample_is_drawn_from_the_posterior(cache: LatentCache) -> None:
    batch = cache.batch(np.arange(60))
    scale = cache.header.scaling_factor
    first = draw_noised(batch, scale, 5, torch.zeros(60, dtype=torch.int64))
    again = draw_noised(batch, scale, 5, torch.zeros(60, dtype=torch.int64))
    other = draw_noised(batch, scale, 6, torch.zeros(60, dtype=torch.int64))
    assert torch.equal(first.z, again.z) and not torch.equal(first.z, other.z)
    # at t = 0 what is left is the posterior's own spread and a little noise
    alpha = float(alphas_cumprod()[0])
    spread = alpha * (batch.std.float() * scale) ** 2 + 1 - alpha
    away = (first.z - alpha**0.5 * batch.mean.float() * scale) / spread.sqrt()
    assert float(away.mean()) == pytest.approx(0, abs=0.05)
    assert float(away.std()) == pytest.approx(1, abs=0.05)
    times = draw_noised(batch, scale, 5).timesteps
    assert times.min() >= 0 and times.max() < 1000 and len(set(times.tolist())) > 40


def test_losses_are_per_image_and_the_papers(
    cache: LatentCache, random_components: Components
) -> None:
    aligner = random_components.aligner
    batch = cache.batch(np.arange(12))
    noised = draw_noised(batch, cache.header.scaling_factor, 0)
    network = AlignerFeatures(aligner)
    losses, statistics = stage1_losses(network, noised, cache.label_table)
    labels = cache.label_table[batch.labels]
    regions = aligner.region_map(batch.boxes, batch.mask)
    f_global, f_local = aligner.features(noised.z, regions)
    omega_global = global_loss(f_global, batch.caption)
    omega_local = local_mean(local_loss(f_local, labels, batch.mask), batch.mask)
    torch.testing.assert_close(losses, omega_global + omega_local)

    found = summary(statistics)
    assert found["global"] == pytest.approx(float(omega_global.mean()), abs=1e-5)
    with_boxes = batch.mask.sum(1) > 0
    assert found["local"] == pytest.approx(float(omega_local[with_boxes].mean()), abs=1e-5)
    assert found["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    by_t = found["global_by_t"]
    assert isinstance(by_t, list) and len(by_t) == BUCKETS
    for bucket, value in enumerate(by_t):
        chosen = noised.timesteps // 100 == bucket
        if not chosen.any():
            assert value is None
        else:
            assert value == pytest.approx(float(omega_global[chosen].mean()), abs=1e-5)
    assert statistics[QUANTITIES.index("region_r1"), 1].sum() == batch.mask.sum()


def test_parts_add_up_to_the_whole(cache: LatentCache, random_components: Components) -> None:
    aligner = Aligner(random_components.aligner.config)
    network = AlignerFeatures(aligner)
    noised = draw_noised(cache.batch(np.arange(12)), cache.header.scaling_factor, 0)
    whole, _ = stage1_losses(network, noised, cache.label_table)
    whole.mean().backward()
    wanted = [p.grad.clone() for p in aligner.parameters() if p.grad is not None]
    aligner.zero_grad()
    for start in (0, 6):
        batch = cache.batch(np.arange(start, start + 6))
        some = slice(start, start + 6)
        part = type(noised)(batch, noised.z[some], noised.timesteps[some], noised.noise[some])
        (stage1_losses(network, part, cache.label_table)[0].mean() / 2).backward()
    found = [p.grad for p in aligner.parameters() if p.grad is not None]
    assert len(found) == len(wanted) > 10
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_an_image_without_boxes_counts_for_the_caption_only(
    cache: LatentCache, random_components: Components
) -> None:
    batch = cache.batch(np.arange(4))
    batch.mask.zero_()
    noised = draw_noised(batch, cache.header.scaling_factor, 0)
    network = AlignerFeatures(random_components.aligner)
    losses, statistics = stage1_losses(network, noised, cache.label_table)
    found = summary(statistics)
    assert found["local"] is None and found["region_r1"] is None
    assert torch.isfinite(losses).all()
    assert found["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
