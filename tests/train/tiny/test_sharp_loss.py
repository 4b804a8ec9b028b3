"""The reconstruction loss of the second edition's VAE: what it sees, the same in every run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hcma_fast.train.tiny.sharp_loss import (
    RandomFeatures,
    SharpLoss,
    gradient_loss,
    reconstruction_loss,
)


def test_is_zero_for_the_same_picture_alone() -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    loss, mse = SharpLoss()(images, images)
    assert loss == mse == 0
    for other in (images + 0.1, images.flip(-1), images.roll(1, -2)):
        assert SharpLoss()(other, images)[0] > reconstruction_loss(other, images)[0] > 0


def test_parts_by_hand() -> None:
    images, output = torch.zeros(1, 1, 2, 3), torch.tensor([[[[0.0, 1, 1], [0, 1, 3]]]])
    loss, mse = reconstruction_loss(output, images)
    assert mse == pytest.approx(12 / 6) and loss == pytest.approx(1 + 4 * 2)
    # across: 1, 0, 1, 2 and down: 0, 0, 2
    assert gradient_loss(output, images) == pytest.approx(4 / 4 + 2 / 3)
    # a shift of all colours has no gradient
    assert gradient_loss(images + 0.5, images) == 0


def test_wants_edges_more_than_squares_do() -> None:
    """Of two errors of one size, the one that blurs an edge costs more."""
    images = torch.ones(1, 3, 32, 32)
    images[..., 16:] = -1
    soft = F.avg_pool2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), 7, 1)
    flat = images + (soft - images).square().mean().sqrt()
    sharp = SharpLoss()
    assert reconstruction_loss(flat, images)[1] == pytest.approx(
        float(reconstruction_loss(soft, images)[1]), rel=1e-5
    )
    features = RandomFeatures()
    assert features.distance(soft, images) > features.distance(flat, images)
    assert sharp(soft, images)[0] - reconstruction_loss(soft, images)[0] > 0.05


def test_features_are_fixed_and_pass_gradients_to_the_output_alone() -> None:
    first, second = RandomFeatures(), RandomFeatures()
    torch.manual_seed(1)
    images = torch.rand(2, 3, 16, 16)
    assert not list(first.parameters())
    for one, other in zip(first(images), second(images), strict=True):
        assert torch.equal(one, other)
    assert [tuple(level.shape[1:]) for level in first(images)] == [
        (16, 16, 16),
        (32, 8, 8),
        (48, 4, 4),
    ]
    # flat areas give nothing, whatever their colour
    assert first(torch.full((1, 3, 16, 16), 0.7))[0][..., 1:-1, 1:-1].abs().max() < 1e-5
    output, target = torch.rand(1, 3, 16, 16, requires_grad=True), torch.rand(1, 3, 16, 16)
    target.requires_grad_()
    first.distance(output, target).backward()
    assert output.grad is not None and output.grad.abs().max() > 0 and target.grad is None
