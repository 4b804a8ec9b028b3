"""EmojiScenes as training examples: cached VAE posteriors, captions, boxes and label indices."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.errors import WeightsError
from hcma_fast.files import write_whole
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer
from hcma_fast.models.text import tokenize_cut
from hcma_fast.train.data.emoji_scenes import FIRST, Edition, Scene, Split
from hcma_fast.train.data.scenes_cache import rendered_scenes
from hcma_fast.train.tiny.vae import to_tensor

_log = logging.getLogger("hcma_fast")


def trained_part(folder: Path, command: str) -> Path:
    """``folder``, a part of `tiny` that ``command`` makes.

    Raises:
        WeightsError: it is not there.
    """
    if not folder.is_dir():
        raise WeightsError(
            f"there is no {folder.name} yet", value=str(folder), remedy=f"Run {command} first."
        )
    return folder


@torch.no_grad()
def cached_posteriors(
    folder: Path, vae: AutoencoderKL, split: Split, count: int, edition: Edition = FIRST
) -> NDArray[np.float16]:
    """Posterior mean and standard deviation of each scene, (count, 2, 4, h, w) float16."""
    # of another VAE, the latents are others
    digest = hashlib.sha256(
        b"".join(value.numpy().tobytes() for value in vae.encoder.state_dict().values())
    ).hexdigest()[:12]
    prefix = "latents" if edition is FIRST else f"latents{edition.number}"
    path = folder / f"{prefix}-{split}-{count}-{digest}.npy"
    if not path.exists():
        scenes = rendered_scenes(folder, split, count, edition=edition)
        _log.info("Encoding them, once for this VAE.")
        parts = []
        for start in range(0, count, 100):
            posterior = vae.encode(to_tensor(scenes[start : start + 100])).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std], dim=1).half().numpy())
        write_whole(path, lambda file: np.save(file, np.concatenate(parts)))
    loaded: NDArray[np.float16] = np.load(path)
    return loaded


@dataclass(frozen=True)
class Batch:
    """One training batch of B images with M boxes each."""

    z0: Tensor
    """(B, 4, h, w), scaled latent"""
    hidden: Tensor
    """(B, 77, d)"""
    caption: Tensor
    """(B, d)"""
    boxes: Tensor
    """(B, M, 4)"""
    mask: Tensor
    """(B, M)"""
    labels: Tensor
    """(B, M, d)"""


class SceneLatents:
    """Random batches of EmojiScenes with frozen VAE and text encoder, drawn by step number."""

    def __init__(self, folder: Path, split: Split, count: int, edition: Edition = FIRST) -> None:
        text = "hcma-fast train text"
        self.tokenizer = load_tokenizer(trained_part(folder / "tokenizer", text))
        encoder = trained_part(folder / "text_encoder", text)
        self.text_encoder = load_part(CLIPTextModel, encoder).eval()
        vae = load_part(AutoencoderKL, trained_part(folder / "vae", "hcma-fast train vae")).eval()
        self.scaling_factor = float(vae.config.scaling_factor)
        self.phrases = edition.phrases
        self.posteriors = cached_posteriors(folder, vae, split, count, edition)
        self.scenes: list[Scene] = [
            edition.sample(split, index, edition.image_size) for index in range(count)
        ]

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, 77, d) and pooled embeddings (B, d)."""
        output = self.text_encoder(input_ids=tokenize_cut(self.tokenizer, texts))
        return output.last_hidden_state, output.pooler_output

    @cached_property
    def label_table(self) -> Tensor:
        """Pooled embedding of each phrase that a layout can have, (phrases, d)."""
        return self.encode(list(self.phrases))[1]

    @cached_property
    def empty_hidden(self) -> Tensor:
        """Hidden states of the empty caption, (77, d)."""
        return self.encode([""])[0][0]

    def batch(
        self, step: int, size: int, without_caption: NDArray[np.bool_] | None = None
    ) -> Batch:
        """The batch of this step; ``hidden`` is the empty caption's where ``without_caption``."""
        rng = np.random.default_rng([3, step])
        chosen = rng.choice(len(self.scenes), size, replace=False)
        posterior = torch.from_numpy(self.posteriors[chosen]).float()
        noise = torch.randn(posterior[:, 0].shape, generator=torch.Generator().manual_seed(step))
        boxes = torch.zeros(size, MAX_OBJECTS, 4)
        mask = torch.zeros(size, MAX_OBJECTS)
        labels = torch.zeros(size, MAX_OBJECTS, self.label_table.shape[1])
        captions = []
        for row, index in enumerate(chosen):
            scene = self.scenes[index]
            captions.append(str(rng.choice(scene.captions)))
            for slot, item in enumerate(scene.objects):
                boxes[row, slot] = torch.tensor(item.box)
                mask[row, slot] = 1
                labels[row, slot] = self.label_table[self.phrases.index(item.phrase)]
        hidden, pooled = self.encode(captions)
        if without_caption is not None:
            hidden[torch.from_numpy(without_caption)] = self.empty_hidden
        z0 = (posterior[:, 0] + posterior[:, 1] * noise) * self.scaling_factor
        return Batch(z0, hidden, pooled, boxes, mask, labels)
