"""What the sampler is conditioned on: texts and boxes, through their two graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from hcma_fast.layout import Layout
from hcma_fast.models.text import tokenize
from hcma_fast.runtime.engine import Engine
from hcma_fast.runtime.sampler import Conditioning
from hcma_fast.specs import GraphName


def condition(
    engines: Mapping[GraphName, Engine],
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    negatives: Sequence[str] | None,
    layouts: Sequence[Layout],
    device: str = "cpu",
) -> Conditioning:
    """Encode prompts and phrases, compute grounding tokens and region maps.

    Args:
        prompts, layouts: one per image.
        negatives: one per image; None without guidance, then there is no unconditional half.

    Raises:
        InputError: a text is too long; all are checked before the first engine runs.
    """
    prompt_ids = tokenize(tokenizer, prompts).to(device)
    negative_ids = tokenize(tokenizer, negatives or [], "negative prompt").to(device)
    # each distinct phrase is encoded once, in a fixed order
    phrases = sorted({phrase for layout in layouts for phrase in layout.phrases})
    phrase_ids = tokenize(tokenizer, phrases, "phrase").to(device)

    text = engines["text_encoder"]
    encoded = text({"input_ids": prompt_ids})
    hidden, caption = encoded["last_hidden_state"], encoded["pooler_output"]
    padded = [layout.padded() for layout in layouts]
    boxes = torch.from_numpy(np.stack([box for box, _ in padded])).to(device)
    mask = torch.from_numpy(np.stack([valid for _, valid in padded])).to(device)
    labels = torch.zeros(*mask.shape, caption.shape[-1], device=device)
    if phrases:
        pooled = text({"input_ids": phrase_ids})["pooler_output"]
        for row, layout in enumerate(layouts):
            for slot, phrase in enumerate(layout.phrases):
                labels[row, slot] = pooled[phrases.index(phrase)]

    inputs: dict[str, Tensor] = {"boxes": boxes, "region_mask": mask, "label_embeddings": labels}
    grounded = engines["grounding"](inputs)
    tokens = grounded["grounding_tokens"]
    if negatives is not None:
        without_boxes = engines["grounding"]({**inputs, "region_mask": torch.zeros_like(mask)})
        tokens = torch.cat([without_boxes["grounding_tokens"], tokens])
        hidden = torch.cat([text({"input_ids": negative_ids})["last_hidden_state"], hidden])
    return Conditioning(hidden, tokens, caption, labels, grounded["regions"], mask)
