"""CLIP's text side: prompts to token ids, and the `text_encoder` graph."""

from __future__ import annotations

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
    """The `text_encoder` graph: hidden states for cross-attention, pooled embedding as f^T."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 77) int64 -> last_hidden_state (B, 77, d), pooler_output (B, d), unprojected."""
        output = self.encoder(input_ids=input_ids)
        return output.last_hidden_state.float(), output.pooler_output.float()
