"""Packing a training run as an embedded checkpoint."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcma_fast.config import PRESETS, AlignmentSettings
from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.train.tiny.pack import SUMS_FILE, pack

SETTINGS = AlignmentSettings(eta0=3.0, guidance_scale=2.0)


def test_pack_stores_half_precision_that_loads(random_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    pack(random_checkpoint, out, SETTINGS, image_size=16)
    parts = load_components(out)
    assert (parts.preset, parts.image_size, parts.settings) == ("tiny", 16, SETTINGS)
    for path in out.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    for line in (out / SUMS_FILE).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert len((out / SUMS_FILE).read_text().splitlines()) == 4


def test_pack_prefers_the_sharper_decoder(random_checkpoint: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(random_checkpoint, tmp_path / "run"))
    shutil.copytree(run / "vae", run / "vae-sharp")
    file = run / "vae-sharp/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({name: torch.zeros_like(value) for name, value in state.items()}, file)
    pack(run, tmp_path / "packed", SETTINGS, image_size=16)
    stored = load_file(tmp_path / "packed/vae/diffusion_pytorch_model.safetensors")
    assert all(value.abs().max() == 0 for value in stored.values())


def test_pack_refuses_a_wrong_size(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="latent size"):
        pack(random_checkpoint, tmp_path / "packed", SETTINGS, image_size=64)


def test_embedded_weights_are_those_of_the_sums() -> None:
    folder = PRESETS["tiny"]
    lines = (folder / SUMS_FILE).read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert len(lines) == 4
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert total <= 40e6
    unet = load_components("tiny").unet
    assert 3e6 <= sum(p.numel() for p in unet.parameters()) <= 6e6
