"""What the sampler is conditioned on, against the text encoder and position net called directly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.models.unet import Grounding
from hcma_fast.sampling.conditioning import Conditioning, condition
from hcma_fast.specs import BatchRange

PROMPTS = ["a dog and a cat", "a pizza"]
NEGATIVES = ["", "blurry"]
LAYOUTS = [
    Layout(["dog", "cat", "dog"], [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.2, 0, 0.9, 0.3]]),
    Layout.empty(),
]


def encode(parts: Components, texts: list[str]) -> tuple[Tensor, Tensor]:
    ids = parts.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    output = parts.text_encoder(input_ids=ids)
    return output.last_hidden_state, output.pooler_output


def build(parts: Components, negatives: list[str] | None) -> Conditioning:
    specs = parts.specs()
    engines = {name: EagerEngine(m, specs[name]) for name, m in parts.graphs().items()}
    return condition(engines, parts.tokenizer, PROMPTS, negatives, LAYOUTS)


@torch.no_grad()
def test_unconditional_half_comes_first_and_is_not_grounded(random_components: Components) -> None:
    parts, given = random_components, build(random_components, NEGATIVES)
    hidden, pooled = encode(parts, PROMPTS)
    torch.testing.assert_close(given.caption_embedding, pooled)
    boxes = torch.stack([torch.from_numpy(layout.padded()[0]) for layout in LAYOUTS])
    grounding = Grounding(parts.unet, parts.aligner)

    def expect(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grounding(boxes, mask, given.label_embeddings, hidden)  # type: ignore[no-any-return]

    mask = given.region_mask
    text, objects, regions = expect(hidden, mask)
    torch.testing.assert_close(given.text_context[2:], text)
    torch.testing.assert_close(given.grounding_context[2:], objects)
    torch.testing.assert_close(given.regions, regions)
    text, null, _ = expect(encode(parts, NEGATIVES)[0], torch.zeros_like(mask))
    torch.testing.assert_close(given.text_context[:2], text)
    torch.testing.assert_close(given.grounding_context[:2], null)
    # and what these came from, half by half
    for half, inputs in enumerate(given.halves()):
        again = grounding(
            *(inputs[n] for n in ("boxes", "region_mask", "label_embeddings")),
            inputs["encoder_hidden_states"],
        )
        rows = slice(2 * half, 2 * half + 2)
        torch.testing.assert_close(again[0], given.text_context[rows])
        torch.testing.assert_close(again[1], given.grounding_context[rows])
    assert (null - objects)[0, :3].abs().amax(-1).min() > 1e-3
    # an image without boxes has the null tokens in both halves
    torch.testing.assert_close(given.grounding_context[1], given.grounding_context[3])


@torch.no_grad()
def test_each_slot_has_its_own_phrase(random_components: Components) -> None:
    given = build(random_components, NEGATIVES)
    _, (dog, cat) = encode(random_components, ["dog", "cat"])
    torch.testing.assert_close(given.label_embeddings[0, :3], torch.stack([dog, cat, dog]))
    assert given.label_embeddings[0, 3:].abs().max() == given.label_embeddings[1].abs().max() == 0
    assert given.region_mask.sum(-1).tolist() == [3, 0]


@torch.no_grad()
def test_a_text_that_occurs_again_is_encoded_once(random_components: Components) -> None:
    parts, specs = random_components, random_components.specs()
    engines = {name: EagerEngine(m, specs[name]) for name, m in parts.graphs().items()}
    text, rows = engines["text_encoder"], list[int]()

    class Small:
        """Takes two texts at once."""

        spec = replace(text.spec, batch=BatchRange(1, 1, 2))

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            rows.append(len(inputs["input_ids"]))
            return text(inputs)

    prompts, negatives = ["dog", "cat"], ["", "dog"]
    layouts = [Layout(["dog"], [[0, 0, 1, 1]]), Layout(["cat", "dog"], [[0, 0, 1, 1]] * 2)]
    named = {**engines, "text_encoder": Small()}
    given = condition(named, parts.tokenizer, prompts, negatives, layouts)
    assert rows == [2, 1]  # "dog", "cat" and ""
    hidden, pooled = encode(parts, prompts)
    torch.testing.assert_close(given.caption_embedding, pooled)
    states = torch.cat([encode(parts, negatives)[0], hidden])
    torch.testing.assert_close(given.encoder_hidden_states, states)
    dog, cat = pooled
    torch.testing.assert_close(given.label_embeddings[0, 0], dog)
    torch.testing.assert_close(given.label_embeddings[1, :2], torch.stack([cat, dog]))


def test_without_guidance_there_is_one_half(random_components: Components) -> None:
    alone, both = build(random_components, None), build(random_components, NEGATIVES)
    assert len(alone.text_context) == len(alone.grounding_context) == 2
    torch.testing.assert_close(alone.text_context, both.text_context[2:])
    torch.testing.assert_close(alone.grounding_context, both.grounding_context[2:])
    (only,), (_, last) = alone.halves(), both.halves()
    assert only.keys() == last.keys()
    for name, value in only.items():
        torch.testing.assert_close(value, last[name])
