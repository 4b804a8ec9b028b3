"""Stable Diffusion 1.4 at full size from a single file: time and memory of loading it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from hcma_fast.models.checkpoint.formats.architecture import TEXT, UNET, VAE

from original_files import text_state, unet_state, vae_state

_LOAD = """
import json, resource, sys, time
from hcma_fast.models.checkpoint.folder import load_components
started = time.monotonic()
parts = load_components(sys.argv[1])
seconds = time.monotonic() - started
count = sum(p.numel() for m in (parts.unet, parts.vae, parts.text_encoder) for p in m.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "parameters": count}))
"""


@pytest.mark.slow
def test_time_and_memory_of_a_file_of_4_gb(tmp_path: Path) -> None:
    state = {}
    with torch.device("meta"):
        parts = {
            "model.diffusion_model.": unet_state(
                UNet2DConditionModel(**{**UNET, "attention_type": "default"}).state_dict()
            ),
            "first_stage_model.": vae_state(AutoencoderKL(**VAE).state_dict()),
            "cond_stage_model.transformer.": text_state(
                CLIPTextModel(CLIPTextConfig(**TEXT)).state_dict()
            ),
        }
    for prefix, tensors in parts.items():
        for name, value in tensors.items():
            state[prefix + name] = torch.zeros(value.shape, dtype=value.dtype)
    file = tmp_path / "sd-v1-4.safetensors"
    save_file(state, file)
    del state
    size = file.stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(file)],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    found = json.loads(done.stdout)
    print(f"{size / 1e9:.2f} GB: {found}")
    assert found["parameters"] > 1.06e9
    assert found["seconds"] < 90
    assert found["peak_bytes"] < 1.3 * size
