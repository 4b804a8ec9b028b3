"""What the sampler is conditioned on: texts and boxes, through their two graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from hcma_fast.engine import Engine
from hcma_fast.layout import Layout
from hcma_fast.models.text import tokenize
from hcma_fast.sampling.loop import Conditioning, ground, grounding_inputs
from hcma_fast.specs import GraphName


def condition(
    engines: Mapping[GraphName, Engine],
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    negatives: Sequence[str] | None,
    layouts: Sequence[Layout],
    device: str = "cpu",
) -> Conditioning:
    """Encode prompts and phrases, compute keys and values and region maps.

    Args:
        prompts, layouts: one per image.
        negatives: one per image; None without guidance, then there is no unconditional half.

    Raises:
        InputError: a text is too long; all are checked before the first engine runs.
    """
    phrases = [phrase for layout in layouts for phrase in layout.phrases]
    kinds = {"prompt": prompts, "negative prompt": negatives or [], "phrase": phrases}
    ids = torch.cat([tokenize(tokenizer, texts, kind) for kind, texts in kinds.items()])
    # each distinct text is encoded once, all in one batch; `place` has a row for each text above
    distinct, place = ids.unique(dim=0, return_inverse=True)
    encoded = _in_chunks(engines["text_encoder"], distinct.to(device))
    rows = place.to(device).split([len(texts) for texts in kinds.values()])
    (hidden, negative_hidden, _), (caption, _, pooled) = (
        [encoded[name][row] for row in rows] for name in ("last_hidden_state", "pooler_output")
    )

    padded = [layout.padded() for layout in layouts]
    boxes = torch.from_numpy(np.stack([box for box, _ in padded])).to(device)
    mask = torch.from_numpy(np.stack([valid for _, valid in padded])).to(device)
    labels = torch.zeros(*mask.shape, caption.shape[-1], device=device)
    labels[mask.bool()] = pooled
    states = torch.cat([negative_hidden, hidden])
    return Conditioning(
        **ground(engines, grounding_inputs(boxes, mask, labels, states)),
        caption_embedding=caption,
        label_embeddings=labels,
        region_mask=mask,
        boxes=boxes,
        encoder_hidden_states=states,
    )


def _in_chunks(text: Engine, ids: Tensor) -> dict[str, Tensor]:
    """Encode texts, no more at once than the engine takes."""
    parts = [text({"input_ids": chunk}) for chunk in ids.split(text.spec.batch.max)]
    return {name: torch.cat([part[name] for part in parts]) for name in text.spec.output_names}
