"""The supervision of attention maps: what it rewards, and that it leaves the model alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.train.tiny.grounding_attention import GroundingAttention, localisation_loss

SIDE = 4
#: box 0 is the left half, box 1 the lower right quarter; box 2 is masked
BOXES = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]])
MASK = torch.tensor([[1.0, 1.0, 0.0]])


def attention(left: int | None, lower_right: int | None, rest: int | None) -> Tensor:
    """All attention of a cell on one box, by the part of the image that the cell lies in."""
    shares = torch.zeros(1, SIDE, SIDE, 3)
    parts = ((left, slice(None), slice(0, 2)), (lower_right, slice(2, 4), slice(2, 4)))
    for box, rows, columns in (*parts, (rest, slice(0, 2), slice(2, 4))):
        if box is not None:
            shares[:, rows, columns, box] = 1
    return shares.flatten(1, 2)


def test_right_attention_costs_nothing() -> None:
    assert localisation_loss(attention(0, 1, None), BOXES, MASK).abs() < 0.01


@pytest.mark.parametrize(
    "shares",
    [attention(1, 0, None), attention(None, None, None), attention(0, 1, 0), attention(2, 2, 2)],
    ids=["swapped", "none", "astray", "on a masked box"],
)
def test_wrong_attention_costs(shares: Tensor) -> None:
    assert localisation_loss(shares, BOXES, MASK) > 1


def test_no_box_costs_nothing_and_is_finite() -> None:
    shares = torch.full((1, SIDE * SIDE, 3), 1 / 40, requires_grad=True)
    loss = localisation_loss(shares, BOXES, torch.zeros(1, 3))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(-math.log(1.001), abs=2e-3)
    assert shares.grad is not None and bool(shares.grad.isfinite().all())


def test_hooks_read_the_maps_and_change_nothing(random_components: Components) -> None:
    torch.manual_seed(0)
    unet = copy.deepcopy(random_components.unet).requires_grad_(True)
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.6]]).expand(2, MAX_OBJECTS, 4)
    gligen = {
        "boxes": boxes,
        "positive_embeddings": torch.randn(2, MAX_OBJECTS, 16),
        "masks": (torch.arange(MAX_OBJECTS) < 1).float().expand(2, -1),
    }
    arguments = (torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 77, 16))

    def run(grounded: bool) -> Tensor:
        kwargs = {"gligen": gligen} if grounded else None
        output: Tensor = unet(*arguments, cross_attention_kwargs=kwargs).sample
        return output

    before = run(grounded=True)
    hooks = GroundingAttention(unet)
    torch.testing.assert_close(run(grounded=True), before, rtol=0, atol=0)
    loss = hooks.loss(boxes, gligen["masks"])
    loss.backward()  # type: ignore[no-untyped-call]
    trained = {n for n, p in unet.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert any(name.endswith("fuser.attn.to_q.weight") for name in trained)
    run(grounded=False)
    assert hooks.loss(boxes, gligen["masks"]) == 0, "no map without gated layers, and none is kept"
