"""Hashes of loaded parts: whether two models have the same encoders."""

from __future__ import annotations

import hashlib
import json

from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer


def encoder_hashes(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> tuple[str, str]:
    """Of the VAE's encoder, and of the text encoder with its tokenizer: what an aligner reads."""
    return (
        state_hash(vae.encoder, vae.quant_conv),
        state_hash(text_encoder, extra=tokenizer.get_vocab()),
    )


def state_hash(*modules: nn.Module | None, extra: object = None) -> str:
    """sha256 of the modules' tensors, and of what else the result depends on."""
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for module in modules:
        for name, value in module.state_dict().items() if module is not None else ():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
