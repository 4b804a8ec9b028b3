"""What the sampler is conditioned on: texts and boxes, through their two graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from hcma_fast.engine import Engine
from hcma_fast.layout import Layout
from hcma_fast.models.text import tokenize
from hcma_fast.specs import GraphName


@dataclass(frozen=True)
class Conditioning:
    """What stays fixed over the steps. C = 2B with guidance (unconditional half first), else B."""

    text_context: Tensor
    """(C, 77, W) keys and values of the caption in every attention layer"""
    grounding_context: Tensor
    """(C, M, W) those of the boxes"""
    caption_embedding: Tensor
    """(B, d)"""
    label_embeddings: Tensor
    """(B, M, d)"""
    regions: Tensor
    """(B, M, N)"""
    region_mask: Tensor
    """(B, M)"""
    boxes: Tensor
    """(B, M, 4)"""
    encoder_hidden_states: Tensor
    """(C, 77, d) of the captions: the contexts come from these and the boxes"""

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as the graphs call their inputs."""
        return {
            "text_context": self.text_context,
            "grounding_context": self.grounding_context,
            "caption_embedding": self.caption_embedding,
            "label_embeddings": self.label_embeddings,
            "regions": self.regions,
            "region_mask": self.region_mask,
            "boxes": self.boxes,
            "encoder_hidden_states": self.encoder_hidden_states,
        }

    def by_image(self) -> dict[str, Tensor]:
        """As the step graphs take it: contexts (2B, T, W), half after half, become (B, 2, T, W)."""
        given, batch = self.tensors(), len(self.caption_embedding)
        for name in CONTEXTS:
            given[name] = given[name].unflatten(0, (2, batch)).transpose(0, 1)
        return given

    def halves(self) -> list[dict[str, Tensor]]:
        """See :func:`grounding_inputs`."""
        return grounding_inputs(
            self.boxes, self.region_mask, self.label_embeddings, self.encoder_hidden_states
        )


CONTEXTS = ("text_context", "grounding_context")


def grounding_inputs(
    boxes: Tensor, region_mask: Tensor, label_embeddings: Tensor, encoder_hidden_states: Tensor
) -> list[dict[str, Tensor]]:
    """What the `grounding` graph takes, per half of the guidance, the unconditional one first: it
    has no boxes. The arguments are those of :class:`Conditioning`."""
    states = encoder_hidden_states.split(len(boxes))
    masks = [torch.zeros_like(region_mask), region_mask][-len(states) :]
    fixed = {"boxes": boxes, "label_embeddings": label_embeddings}
    return [
        {**fixed, "region_mask": mask, "encoder_hidden_states": half}
        for mask, half in zip(masks, states, strict=True)
    ]


def ground(
    engines: Mapping[GraphName, Engine], halves: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Contexts of some halves of the guidance, one after the other, and regions of the last."""
    mask = halves[-1]["region_mask"]
    # of a model without GLIGEN's layers, or without an aligner: no columns
    nothing = mask.new_zeros(len(mask), mask.shape[1], 0)
    missing = {"grounding_context": nothing, "regions": nothing}
    found = [{**missing, **engines["grounding"](half)} for half in halves]
    joined = {name: torch.cat([half[name] for half in found]) for name in CONTEXTS}
    return {**joined, "regions": found[-1]["regions"]}


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
