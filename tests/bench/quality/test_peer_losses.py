"""The peers' losses: gradients, diffusers' own, and what descending them does to attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionAttendAndExcitePipeline
from torch import Tensor

from hcma_fast.bench.quality.methods.attend_and_excite import attend_and_excite_loss, subject_maps
from hcma_fast.bench.quality.methods.boxdiff import boxdiff_terms
from hcma_fast.bench.quality.methods.layout_guidance import layout_energy
from hcma_fast.bench.quality.methods.targets import Target, box_cells

TARGETS = (
    Target((3,), ((0.0, 0.0, 0.5, 0.5),)),
    Target((5, 6), ((0.5, 0.5, 1.0, 0.75), (0.75, 0.0, 1.0, 0.25))),
)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "attend-and-excite": lambda a: attend_and_excite_loss(a.mean(0), [t.head for t in TARGETS]),
    "boxdiff": lambda a: torch.stack(boxdiff_terms(a.mean(0), TARGETS)).sum(),
    "layout-guidance": lambda a: layout_energy(a, TARGETS),
}


def logits(seed: int = 0, side: int = 8, heads: int = 2) -> Tensor:
    """Random ones of (heads, side, side, 77), float64; no two maps have equal maxima."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, side, side, 77, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_agrees_with_finite_differences(name: str) -> None:
    start = logits().requires_grad_()
    loss = LOSSES[name](start.softmax(-1))
    (gradient,) = torch.autograd.grad(loss, start)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        # along the gradient and a random direction, so that no entry is left out
        way = gradient / gradient.norm()
        way = way + 0.1 * torch.randn(way.shape, generator=generator, dtype=way.dtype)
        step = 1e-5
        with torch.no_grad():
            ahead, behind = (LOSSES[name]((start + s * way).softmax(-1)) for s in (step, -step))
        expected = float((gradient * way).sum())
        assert float(ahead - behind) / (2 * step) == pytest.approx(expected, rel=1e-6)
        assert expected > 0


def descend(loss_of: Callable[[Tensor], Tensor], start: Tensor, rate: float) -> Tensor:
    current = start.clone()
    for _ in range(40):
        leaf = current.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf.softmax(-1)), leaf)
        current = current - rate * gradient / gradient.norm().clamp(min=1e-12)
    return current.detach().softmax(-1)


def share_inside(attention: Tensor, target: Target) -> float:
    """Of the target's head token: attention inside its boxes."""
    image = attention.mean(0)[..., target.head]
    mask = torch.zeros_like(image)
    for box in target.boxes:
        x0, y0, x1, y1 = box_cells(box, *image.shape, truncate=False)
        mask[y0:y1, x0:x1] = 1
    return float((image * mask).sum() / image.sum())


@pytest.mark.parametrize("name", ["boxdiff", "layout-guidance"])
def test_descending_a_box_loss_moves_attention_into_the_boxes(name: str) -> None:
    start = 0.1 * logits()
    after = descend(LOSSES[name], start, rate=1.5)
    for target in TARGETS:
        area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in target.boxes)
        assert share_inside(start.softmax(-1), target) == pytest.approx(area, abs=0.1)
        assert share_inside(after, target) > area + 0.3


def test_descending_attend_and_excite_raises_the_neglected_token() -> None:
    start = 0.1 * logits()
    # token 3 is neglected everywhere
    start[..., 3] -= 1.0
    after = descend(LOSSES["attend-and-excite"], start, rate=1.5)
    before = subject_maps(start.softmax(-1).mean(0), [3])
    assert float(subject_maps(after.mean(0), [3]).amax()) > 3 * float(before.amax())
    assert float(LOSSES["attend-and-excite"](after)) < 0.5


def test_attend_and_excite_is_the_loss_of_diffusers() -> None:
    attention = logits(3).softmax(-1).mean(0).float()
    theirs = StableDiffusionAttendAndExcitePipeline._compute_max_attention_per_index(
        attention.clone(), [3, 6, 9]
    )
    ours = subject_maps(attention, [3, 6, 9])
    assert ours.amax((1, 2)).tolist() == pytest.approx([float(v) for v in theirs], rel=1e-5)
    loss = StableDiffusionAttendAndExcitePipeline._compute_loss(theirs)
    assert float(attend_and_excite_loss(attention, [3, 6, 9])) == pytest.approx(float(loss))


def test_boxdiff_on_a_map_that_fills_its_box_exactly() -> None:
    target = Target((3,), ((0.25, 0.25, 0.75, 0.75),))
    attention = torch.full((16, 16, 77), 1e-4, dtype=torch.float64)
    attention[4:12, 4:12, 3] = 1.0
    inner, outer, corners = (float(term) for term in boxdiff_terms(attention, (target,)))
    assert inner == pytest.approx(0, abs=1e-6)
    # a Gaussian of 3 x 3 leaks one cell beyond each edge, and on the corners' projections
    assert 0 < outer < 0.4 and 0 < corners < 0.2
    shifted = torch.full_like(attention, 1e-4)
    shifted[4:12, 8:16, 3] = 1.0
    worse = [float(term) for term in boxdiff_terms(shifted, (target,))]
    assert worse[1] > outer + 0.4 and worse[2] > corners


def test_layout_energy_by_hand() -> None:
    target = Target((3,), ((0.0, 0.0, 0.5, 1.0),))
    attention = torch.zeros(2, 4, 4, 77, dtype=torch.float64)
    attention[..., 3] = 1.0
    assert float(layout_energy(attention, (target,))) == pytest.approx(0.25)
    attention[1, :, 2:, 3] = 0.0
    assert float(layout_energy(attention, (target,))) == pytest.approx(0.125)


@pytest.mark.parametrize("truncate", [True, False])
def test_a_small_box_has_a_cell(truncate: bool) -> None:
    for box in ((0.51, 0.51, 0.52, 0.52), (0.99, 0.99, 1.0, 1.0), (0.0, 0.0, 0.01, 0.01)):
        x0, y0, x1, y1 = box_cells(box, 8, 8, truncate=truncate)
        assert 0 <= x0 < x1 <= 8 and 0 <= y0 < y1 <= 8
        target = Target((3,), (box,))
        attention = logits().softmax(-1)
        terms = torch.stack(boxdiff_terms(attention.mean(0), (target,)))
        assert bool(terms.isfinite().all()) and math.isfinite(layout_energy(attention, (target,)))
