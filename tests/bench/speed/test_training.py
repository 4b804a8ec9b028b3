"""The suite of training: a cached loop, one without a cache, and their figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hcma_fast.bench.speed.suites.training import (
    Uncached,
    load_training,
    training_flops,
    write_images,
    write_random_cache,
)
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.train.aligner import train as aligner
from hcma_fast.train.data.encoders import Encoders
from hcma_fast.train.data.latent_cache import LatentCache
from hcma_fast.train.data.views import crop_image


@pytest.mark.parametrize("cached", [True, False])
def test_training_is_timed_with_the_loops_own_rate(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    steps: list[int] = []
    train = aligner.train_aligner

    def spy(*args: Any, progress: Callable[..., None], **kwargs: Any) -> Path:
        def both(done: int, *rest: Any) -> None:
            steps.append(done)
            progress(done, *rest)

        return train(*args, progress=both, **kwargs)

    monkeypatch.setattr(aligner, "train_aligner", spy)
    monkeypatch.setattr("hcma_fast.bench.speed.suites.training.matmul_rate", lambda *_: 2e12)
    contestant = load_training(str(random_checkpoint), 2, 8, False, "cpu", cached=cached)
    contestant.generate()
    first = contestant.figures()
    assert 0 <= first["data_wait_share"] < 1
    if cached:
        rate, flops = first["loop_samples_per_second"], first["gflops"] * 1e9
        assert flops / rate == pytest.approx(2.96e6, rel=0.01)  # as counted below
        assert first["share_of_matmul"] == pytest.approx(flops / 2e12)
    # a second run is a run of its own, not a continuation that finds nothing to do
    contestant.generate()
    assert steps == [1, 2, 1, 2]


def test_a_loop_without_a_cache_encodes_what_a_cache_holds(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    parts = load_components(random_checkpoint)
    write_random_cache(tmp_path, parts, 8)
    encoders = Encoders.load(random_checkpoint, torch.device("cpu"))
    files = write_images(tmp_path, parts.image_size)
    indices = np.array([3, 1])
    found = Uncached(tmp_path, encoders, files, ["a", "b"]).batch(indices)
    kept = LatentCache(tmp_path).batch(indices)
    crops = [np.array(crop_image(Image.open(files[i]), parts.image_size)) for i in indices]
    latents = encoders.posterior(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))
    # another memory layout, another order of sums
    torch.testing.assert_close(found.mean, latents[:, 0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.std, latents[:, 1], rtol=1e-2, atol=1e-3)
    assert torch.equal(found.caption, encoders.embed(["b", "b"])[0])
    assert torch.equal(found.boxes, kept.boxes) and found.mean.shape == kept.mean.shape


def test_operations_of_training_are_three_forward_passes(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    parts = load_components(random_checkpoint)
    for parameter in parts.aligner.parameters():
        parameter.requires_grad_()
    write_random_cache(tmp_path, parts, 8)
    flops = training_flops(parts, LatentCache(tmp_path))
    config = parts.aligner.config
    batch = 2
    z = torch.zeros(batch, config.latent_channels, config.latent_size, config.latent_size)
    regions = parts.aligner.region_map(torch.zeros(batch, 2, 4), torch.zeros(batch, 2))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        parts.aligner.features(z, regions, torch.zeros(batch, dtype=torch.int64))
    forward = counter.get_total_flops() / batch
    # twice more for the gradients of inputs and weights; the first layers have no former ones. The
    # retrieval of the logs adds a little
    assert 2.5 * forward < flops < 3.1 * forward
