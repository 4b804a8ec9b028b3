"""The graphs cut out of the gated UNet agree with diffusers' own way of calling it."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from torch import Tensor, nn

from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.models.regions import cell_coverage
from hcma_fast.models.unet import GroundedUNet, Grounding, PlainUNet


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


def _contexts(parts: Components, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    grounding = Grounding(parts.unet, parts.aligner)
    text, boxes, _ = grounding(x["boxes"], x["mask"], x["labels"], x["hidden"])
    return text, boxes


@torch.no_grad()
def test_grounded_equals_diffusers_gligen_call(random_components: Components) -> None:
    unet, x = random_components.unet, _inputs(random_components)
    (ours,) = GroundedUNet(unet)(x["sample"], x["timestep"], *_contexts(random_components, x))
    gligen = {"boxes": x["boxes"], "positive_embeddings": x["labels"], "masks": x["mask"]}
    expected = unet(
        x["sample"], x["timestep"], x["hidden"], cross_attention_kwargs={"gligen": gligen}
    ).sample
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_plain_equals_diffusers_call_and_closed_gates(random_components: Components) -> None:
    unet, x = random_components.unet, _inputs(random_components)
    text, boxes = _contexts(random_components, x)
    (plain,) = PlainUNet(unet)(x["sample"], x["timestep"], text)
    expected = unet(x["sample"], x["timestep"], x["hidden"]).sample
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-6)
    (grounded,) = GroundedUNet(unet)(x["sample"], x["timestep"], text, boxes)
    assert (plain - grounded).abs().max() > 1e-4
    gates = [p for n, p in unet.named_parameters() if n.endswith(("alpha_attn", "alpha_dense"))]
    kept = [gate.clone() for gate in gates]
    assert gates
    try:
        for gate in gates:
            gate.zero_()
        (closed,) = GroundedUNet(unet)(x["sample"], x["timestep"], text, boxes)
    finally:
        for gate, value in zip(gates, kept, strict=True):
            gate.copy_(value)
    torch.testing.assert_close(plain, closed, rtol=0, atol=0)
    # the gate that is an input, image by image
    graph, given = GroundedUNet(unet), (x["sample"], x["timestep"], text, boxes)
    for gate, expected in (
        ([1.0, 0.0], (grounded[0], plain[1])),
        ([0.0, 1.0], (plain[0], grounded[1])),
    ):
        (found,) = graph(*given, torch.tensor(gate))
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0)
    (half,) = graph(*given, torch.full((2,), 0.5))
    assert min(float((half - end).abs().max()) for end in (plain, grounded)) > 1e-5


def test_wrapping_leaves_the_unet_as_it_was_and_shares_its_weights(
    random_components: Components,
) -> None:
    unet = random_components.unet
    names = set(unet.state_dict())
    grounded, plain = GroundedUNet(unet), PlainUNet(unet)
    assert isinstance(unet.position_net, GLIGENTextBoundingboxProjection)
    assert set(unet.state_dict()) == names

    def memory(module: nn.Module) -> set[int]:
        return {p.untyped_storage().data_ptr() for p in module.parameters()}

    assert memory(grounded) < memory(unet)
    assert memory(plain) < memory(unet)


@torch.no_grad()
def test_masked_boxes_do_not_reach_contexts_or_regions(random_components: Components) -> None:
    x = _inputs(random_components)
    grounding = Grounding(random_components.unet, random_components.aligner)
    _, objects, regions = grounding(x["boxes"], x["mask"], x["labels"], x["hidden"])
    other = x["labels"].clone()
    other[:, 3:] += 1
    moved = x["boxes"].clone()
    moved[:, 3:] /= 2
    _, objects_2, regions_2 = grounding(moved, x["mask"], other, x["hidden"])
    torch.testing.assert_close(objects, objects_2)
    torch.testing.assert_close(regions, regions_2)
    assert regions[:, 3:].abs().max() == 0
    # a cell that a box does not touch has no weight, whatever the gate says
    assert regions[cell_coverage(x["boxes"], 4, 4) == 0].abs().max() == 0
