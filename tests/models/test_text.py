"""Prompts to token ids: nothing is cut off silently; the encoder's output is CLIP's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hcma_fast.config import TOKEN_LENGTH
from hcma_fast.errors import InputError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.models.text import TextEncoder, tokenize


def test_ids(random_components: Components) -> None:
    tokenizer = random_components.tokenizer
    ids = tokenize(tokenizer, ["ab", "", "a" * 75])
    assert ids.shape == (3, TOKEN_LENGTH) and ids.dtype == torch.int64
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[:, 0].tolist() == [start] * 3
    assert [row.tolist().index(end) for row in ids] == [3, 1, 76]
    assert (ids[0, 4:] == tokenizer.pad_token_id).all()
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "") == "ab"


def test_no_texts(random_components: Components) -> None:
    assert tokenize(random_components.tokenizer, []).shape == (0, TOKEN_LENGTH)


@pytest.mark.parametrize("letters", [76, 500])
def test_too_long(random_components: Components, letters: int) -> None:
    with pytest.raises(InputError, match="negative prompt") as caught:
        tokenize(random_components.tokenizer, ["ok", "a" * letters], "negative prompt")
    assert f"{letters + 2} tokens" in str(caught.value)
    assert f"by {letters - 75} tokens" in caught.value.remedy
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", [3, b"dog", ["a", "dog"]])
def test_not_a_string(random_components: Components, text: Any) -> None:
    with pytest.raises(InputError, match="must be a string") as caught:
        tokenize(random_components.tokenizer, [text])
    assert caught.value.value == text


@torch.no_grad()
def test_encoder_equals_clip_and_does_not_depend_on_the_batch(
    random_components: Components,
) -> None:
    encoder = random_components.text_encoder
    ids = tokenize(random_components.tokenizer, ["a dog", "two cats"])
    hidden, pooled = TextEncoder(encoder)(ids)
    expected = encoder(input_ids=ids)
    assert torch.equal(hidden, expected.last_hidden_state)
    assert torch.equal(pooled, expected.pooler_output)
    # unprojected: the pooled embedding is the hidden state at the end token
    ends = (ids == random_components.tokenizer.eos_token_id).int().argmax(-1)
    torch.testing.assert_close(pooled, hidden[torch.arange(2), ends])
    alone = TextEncoder(encoder)(ids[1:])[1]
    torch.testing.assert_close(alone, pooled[1:])
