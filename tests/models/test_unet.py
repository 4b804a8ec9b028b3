"""The graphs cut out of the gated UNet agree with diffusers' own way of calling it."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH
from hcma_fast.models.regions import cell_coverage
from hcma_fast.models.unet import GroundedUNet, Grounding, PlainUNet
from hcma_fast.models.weights import Components


def _inputs(components: Components, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = components.text_encoder.config.hidden_size
    corners = torch.rand(batch, MAX_OBJECTS, 2, 2, generator=generator)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([981, 1][:batch]),
        "hidden": torch.randn(batch, TOKEN_LENGTH, width, generator=generator),
        "boxes": torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1),
        "labels": torch.randn(batch, MAX_OBJECTS, width, generator=generator),
        "mask": (torch.arange(MAX_OBJECTS) < 3).float().expand(batch, -1),
    }


@torch.no_grad()
def test_grounded_equals_diffusers_gligen_call(random_components: Components) -> None:
    unet, x = random_components.unet, _inputs(random_components)
    tokens, _ = Grounding(unet, random_components.aligner)(x["boxes"], x["mask"], x["labels"])
    (ours,) = GroundedUNet(unet)(x["sample"], x["timestep"], x["hidden"], tokens)
    gligen = {"boxes": x["boxes"], "positive_embeddings": x["labels"], "masks": x["mask"]}
    expected = unet(
        x["sample"], x["timestep"], x["hidden"], cross_attention_kwargs={"gligen": gligen}
    ).sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@torch.no_grad()
def test_plain_is_exactly_the_unet_with_closed_gates(random_components: Components) -> None:
    unet, x = random_components.unet, _inputs(random_components)
    (plain,) = PlainUNet(unet)(x["sample"], x["timestep"], x["hidden"])
    tokens = torch.randn(2, MAX_OBJECTS, x["labels"].shape[-1])
    (grounded,) = GroundedUNet(unet)(x["sample"], x["timestep"], x["hidden"], tokens)
    assert (plain - grounded).abs().max() > 1e-4
    gates = [p for n, p in unet.named_parameters() if n.endswith(("alpha_attn", "alpha_dense"))]
    kept = [gate.clone() for gate in gates]
    assert gates
    try:
        for gate in gates:
            gate.zero_()
        (closed,) = GroundedUNet(unet)(x["sample"], x["timestep"], x["hidden"], tokens)
    finally:
        for gate, value in zip(gates, kept, strict=True):
            gate.copy_(value)
    torch.testing.assert_close(plain, closed, rtol=0, atol=0)


def test_wrapping_leaves_the_unet_as_it_was_and_shares_its_weights(
    random_components: Components,
) -> None:
    unet = random_components.unet
    names = set(unet.state_dict())
    grounded, plain = GroundedUNet(unet), PlainUNet(unet)
    assert isinstance(unet.position_net, GLIGENTextBoundingboxProjection)
    assert set(unet.state_dict()) == names
    ours = {p.data_ptr() for p in grounded.parameters()}
    theirs = {p.data_ptr() for p in plain.parameters()}
    positions = {p.data_ptr() for p in unet.position_net.parameters()}
    assert ours == theirs - positions


@torch.no_grad()
def test_masked_boxes_do_not_reach_tokens_or_regions(random_components: Components) -> None:
    x = _inputs(random_components)
    grounding = Grounding(random_components.unet, random_components.aligner)
    tokens, regions = grounding(x["boxes"], x["mask"], x["labels"])
    other = x["labels"].clone()
    other[:, 3:] += 1
    moved = x["boxes"].clone()
    moved[:, 3:] /= 2
    tokens_2, regions_2 = grounding(moved, x["mask"], other)
    torch.testing.assert_close(tokens, tokens_2)
    torch.testing.assert_close(regions, regions_2)
    assert regions[:, 3:].abs().max() == 0
    # a cell that a box does not touch has no weight, whatever the gate says
    assert regions[cell_coverage(x["boxes"], 4, 4) == 0].abs().max() == 0
