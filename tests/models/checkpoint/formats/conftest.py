"""One small model of SD 1.x's kind in every format that people hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hcma_fast.models.checkpoint.tokenizer import clip_tokenizer

from original_files import (
    gligen_checkpoint,
    grounding_layers,
    make_aligner,
    make_parts,
    single_file,
    states,
)


@pytest.fixture(scope="session")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model as diffusers' folders (``gated``, ``plain``) and as files. Do not
    modify it."""
    folder = tmp_path_factory.mktemp("formats")
    gated, plain = make_parts(gated=True), make_parts(gated=False)
    own = gated["unet"].state_dict()
    plain["unet"].load_state_dict({name: own[name] for name in plain["unet"].state_dict()})
    for part in ("vae", "text_encoder"):
        plain[part].load_state_dict(gated[part].state_dict())
    for name, parts in (("gated", gated), ("plain", plain)):
        for part, model in parts.items():
            model.save_pretrained(folder / name / part)  # type: ignore[operator]
        clip_tokenizer().save_pretrained(folder / name / "tokenizer")
    make_aligner().save_pretrained(folder / "aligner")
    of = states(gated)
    save_file(single_file(plain), folder / "plain.safetensors")
    save_file(single_file(gated), folder / "gated.safetensors")
    save_file(grounding_layers(of["unet"]), folder / "adapter.safetensors")
    save_file(grounding_layers(own), folder / "adapter-diffusers.safetensors")
    save_file(of["vae"], folder / "vae.safetensors")
    torch.save(gligen_checkpoint(gated), folder / "gligen.pth")
    return folder
