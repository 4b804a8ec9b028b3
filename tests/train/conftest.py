"""A small split of EmojiScenes in COCO's format, and its cache by a small random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcma_fast.train.data.emoji_scenes import write_coco
from hcma_fast.train.data.encode import make_cache
from hcma_fast.train.data.encoders import Encoders

SCENES = 60


@pytest.fixture(scope="session")
def emoji_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 scenes of 24 x 24 pixels in COCO's format, split ``train``. Do not modify it."""
    folder = tmp_path_factory.mktemp("emoji-coco")
    write_coco(folder, "train", SCENES, 24)
    return folder


@pytest.fixture(scope="session")
def encoders(random_checkpoint: Path) -> Encoders:
    """VAE and text encoder of the small random model: 16 x 16 pixels, latents 8 x 8."""
    return Encoders.load(random_checkpoint, torch.device("cpu"))


@pytest.fixture(scope="session")
def small_cache(
    emoji_coco: Path, encoders: Encoders, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The cache of ``emoji_coco``, in 3 shards. Do not modify it."""
    out = tmp_path_factory.mktemp("cache")
    make_cache(emoji_coco, "train", encoders, out, shard_size=25)
    return out


@pytest.fixture(scope="session")
def inputs(random_checkpoint: Path, small_cache: Path, emoji_coco: Path) -> tuple[Path, ...]:
    """Model, cache and data of a run of stage 2. Do not modify them."""
    return random_checkpoint, small_cache, emoji_coco
