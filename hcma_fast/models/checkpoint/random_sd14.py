"""The paper's model at full size with random weights: for work on compilation and speed.

Nothing is downloaded. Parts are drawn anew for each graph that has them, which takes seconds, and
live as long as the graph, so that the largest part, not their sum, is what it takes in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hcma_fast.config import AlignerConfig, AlignmentSettings
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.models.checkpoint.formats.architecture import TEXT, UNET, VAE
from hcma_fast.models.checkpoint.info import CheckpointInfo
from hcma_fast.specs import BatchRange, GraphName, IOSpec

_SEED = 0


class RandomSD14:
    """A ``ModelSource`` whose weights are drawn, the same each time.

    The tokenizer knows single letters only: CLIP's vocabulary is part of the real checkpoint.
    """

    @property
    def info(self) -> CheckpointInfo:
        """Settings of the paper."""
        return CheckpointInfo(preset="sd14", image_size=512, alignment=AlignmentSettings())

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Letters, so that any ASCII text has tokens."""
        letters = [chr(code) for code in range(33, 127)]
        words = [*letters, *(letter + "</w>" for letter in letters)]
        # CLIP pools at the token of the highest id, the end token
        marks = ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = {word: i for i, word in enumerate([*words, *marks])}
        return CLIPTokenizer(vocab=vocabulary, merges=[])

    @cached_property
    def weights_hash(self) -> str:
        """Of the configs, the seed and torch's generator, which together are the weights."""
        text = json.dumps([UNET, VAE, TEXT, _SEED, torch.__version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def specs(
        self,
        height: int | None = None,
        width: int | None = None,
        batch: BatchRange | None = None,
    ) -> dict[GraphName, IOSpec]:
        """See :meth:`hcma_fast.models.checkpoint.folder.Components.specs`."""
        return self.without_weights().specs(height, width, batch)

    def parameter_counts(self) -> dict[GraphName, int]:
        """See :meth:`hcma_fast.models.checkpoint.folder.Components.parameter_counts`."""
        return self.without_weights().parameter_counts()

    def without_weights(self) -> Components:
        """All parts on the meta device: shapes and dtypes, in no time and memory."""
        with torch.device("meta"):
            return self._assemble(lambda part: _make(part).eval().requires_grad_(False))

    def graph(
        self, name: GraphName, height: int | None = None, width: int | None = None
    ) -> nn.Module:
        """See ``Components.graph``; nothing of it is kept here."""
        parts = {"text_encoder": ["text"], "align": ["aligner"], "vae_decoder": ["vae"]}
        return self.drawn(*parts.get(name, ["unet", "aligner"])).graph(name, height, width)

    def drawn(self, *parts: str, device: str = "cpu") -> Components:
        """With weights for these ("text", "unet", "vae", "aligner"); the others on the meta
        device.

        Args:
            device: where they are drawn; a GPU takes no time, and its generator gives other
                weights than the CPU's, which ``weights_hash`` is of.
        """

        def make(part: str) -> Any:
            if part in parts:
                return _draw(part, device)
            with torch.device("meta"):
                return _make(part)

        return self._assemble(make)

    def _assemble(self, make: Callable[[str], Any]) -> Components:
        """All parts in one; ``make`` gives "text", "unet", "vae" and "aligner"."""
        return Components(
            preset="sd14",
            tokenizer=self.tokenizer,
            text_encoder=make("text"),
            unet=make("unet"),
            vae=make("vae"),
            aligner=make("aligner"),
            settings=self.info.alignment,
            image_size=self.info.image_size,
            weights_hash=self.weights_hash,
            source=None,
        )


def _make(part: str) -> Any:
    if part == "unet":
        return UNet2DConditionModel(**UNET)
    if part == "vae":
        return AutoencoderKL(**VAE)
    if part == "text":
        return CLIPTextModel(CLIPTextConfig(**TEXT, bos_token_id=188, eos_token_id=189))
    return Aligner(AlignerConfig())


@torch.no_grad()
def _draw(part: str, device: str = "cpu") -> nn.Module:
    """A part with weights of the size that keeps activations near 1."""
    with torch.device("meta"):
        module: nn.Module = _make(part)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(_SEED)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
            value.copy_(torch.arange(value.numel(), device=device).view_as(value))  # position ids
        elif value.dim() < 2:
            # gates of the grounding start at 0, which would leave it out
            value.fill_(0.5 if "alpha" in name else float("norm" in name and "weight" in name))
        else:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
    return module.eval().requires_grad_(False)
