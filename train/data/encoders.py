"""The frozen encoders that the aligner's data is made with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from hcma_fast.config import TOKEN_LENGTH
from hcma_fast.models.checkpoint.folder import Components, trained_size
from hcma_fast.models.checkpoint.info import check_safe, read_info, resolve_folder
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.models.checkpoint.state_hash import encoder_hashes
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer
from hcma_fast.models.text import tokenize_cut
from hcma_fast.train.data.latent_cache import CacheHeader

ComputeDtype = Literal["float32", "bfloat16", "float16"]
_TEXTS_AT_ONCE = 256


class Encoders:
    """The frozen parts that the aligner's data needs: VAE encoder, text encoder, tokenizer."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        *,
        preset: str,
        image_size: int,
        device: torch.device,
        dtype: ComputeDtype = "float32",
    ) -> None:
        """Take loaded parts; they are moved to ``device``, and the VAE is cast to ``dtype``."""
        self.tokenizer, self.text_encoder, self.vae = tokenizer, text_encoder, vae
        self.preset, self.image_size = preset, image_size
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.device, self.dtype = device, dtype
        # before they are cast: the hash is of the weights, not of the precision
        self.vae_sha256, self.text_sha256 = encoder_hashes(vae, text_encoder, tokenizer)
        self.vae.requires_grad_(False).eval().to(device)
        if dtype != "float32":
            self.vae = self.vae.half() if dtype == "float16" else self.vae.bfloat16()
        self.text_encoder.requires_grad_(False).eval().to(device)

    @classmethod
    def load(
        cls, model: str | Path, device: torch.device, dtype: ComputeDtype = "float32"
    ) -> Encoders:
        """From a preset, a folder in diffusers' layout or a hub id.

        Raises:
            WeightsError: a part is missing, damaged or unsafe.
        """
        folder = resolve_folder(model)
        check_safe(folder)
        info = read_info(folder)
        vae = load_part(AutoencoderKL, folder / "vae")
        return cls(
            load_tokenizer(folder / "tokenizer"),
            load_part(CLIPTextModel, folder / "text_encoder"),
            vae,
            preset=info.preset if info else "sd14",
            image_size=info.image_size if info else trained_size(vae, folder / "vae"),
            device=device,
            dtype=dtype,
        )

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S) uint8 -> (B, 2, C, h, w) float16: mean and standard deviation."""
        pixels = images.to(self.device).to(self.vae.dtype) / 127.5 - 1
        found = self.vae.encode(pixels).latent_dist
        return torch.stack([found.mean, found.std], dim=1).half().cpu()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """Pooled embeddings (B, d) float32, and how many texts were too long and lost their end."""
        parts, cut = [], 0
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = list(texts[start : start + _TEXTS_AT_ONCE])
            cut += sum(len(ids) > TOKEN_LENGTH for ids in self.tokenizer(some).input_ids)
            ids = tokenize_cut(self.tokenizer, some)
            output = self.text_encoder(input_ids=ids.to(self.device))
            parts.append(output.pooler_output.float().cpu())
        return torch.cat(parts), cut


def made_with(header: CacheHeader, parts: Components) -> bool:
    """Was the cache made with the VAE encoder, the text encoder and the tokenizer of ``parts``?"""
    found = encoder_hashes(parts.vae, parts.text_encoder, parts.tokenizer)
    return (header.vae_sha256, header.text_sha256) == found
