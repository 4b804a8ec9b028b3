"""CLIP's text side: prompts to token ids, and the `text_encoder` graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from hcma_fast.config import TOKEN_LENGTH
from hcma_fast.errors import InputError

_SHOWN_LETTERS = 80


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], kind: str = "prompt") -> Tensor:
    """Token ids (B, 77) int64: start token, the text, end token, padding.

    Args:
        kind: what the texts are, for the error message.

    Raises:
        InputError: a text is not a string, or has more than 77 tokens; nothing is cut off silently.
    """
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"a {kind} must be a string", value=text, remedy='Write "a dog".')
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(
                f"this {kind} has half of a surrogate pair, which is no text",
                value=text,
                remedy="Write it as UTF-8.",
            )
    if not texts:
        return torch.zeros(0, TOKEN_LENGTH, dtype=torch.int64)
    # verbose=False: the count is checked below, transformers need not warn of it as well
    rows: list[list[int]] = tokenizer(
        list(texts), padding="max_length", max_length=TOKEN_LENGTH, truncation=False, verbose=False
    ).input_ids
    for text, row in zip(texts, rows, strict=True):
        if len(row) > TOKEN_LENGTH:
            raise InputError(
                f"this {kind} has {len(row)} tokens, the text encoder takes {TOKEN_LENGTH}",
                value=text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 3] + "...",
                remedy=f"Shorten it by {len(row) - TOKEN_LENGTH} tokens or more.",
            )
    return torch.tensor(rows, dtype=torch.int64)


def tokenize_cut(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, 77) int64 as :func:`tokenize` has them; a text that is too long loses its end.

    For data sets, whose captions nobody can shorten.
    """
    ids: Tensor = tokenizer(
        list(texts),
        padding="max_length",
        max_length=TOKEN_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


class TextEncoder(nn.Module):
    """The `text_encoder` graph: hidden states for cross-attention, pooled embedding as f^T.

    Args:
        clip_skip: 1 for the hidden states of the last layer, 2 for those of the one before, as the
            web interfaces count. The pooled embedding is always that of the last layer: GLIGEN and
            the aligner were trained with it.
    """

    def __init__(self, encoder: CLIPTextModel, clip_skip: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        layers = encoder.config.num_hidden_layers
        if clip_skip > layers:
            raise InputError(
                f"this text encoder has {layers} layers",
                value=f"clip_skip {clip_skip}",
                remedy=f"Use a clip_skip from 1 to {layers}.",
            )
        self.shorter = _without_last(encoder, clip_skip - 1) if clip_skip > 1 else None

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 77) int64 -> last_hidden_state (B, 77, d), pooler_output (B, d), unprojected."""
        output = self.encoder(input_ids=input_ids)
        hidden = output.last_hidden_state
        if self.shorter is not None:
            hidden = self.shorter(input_ids=input_ids).last_hidden_state
        return hidden.float(), output.pooler_output.float()


def _without_last(encoder: CLIPTextModel, count: int) -> CLIPTextModel:
    """A copy that shares every weight and lacks the last layers; the final norm stays."""
    shared = {id(value): value for value in (*encoder.parameters(), *encoder.buffers())}
    copied = copy.deepcopy(encoder, shared)
    copied.encoder.layers = copied.encoder.layers[:-count]
    return copied
