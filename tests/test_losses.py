"""The two losses: values and gradients, their range, and that images and boxes stay apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hcma_fast.losses import cosine_distance, global_loss, local_loss, local_mean

pytestmark = pytest.mark.smoke

#: a busy machine is no fault of the code
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

B, M, D = 3, 4, 6


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(*counts: int) -> Tensor:
    return (torch.arange(M) < torch.tensor(counts)[:, None]).double()


vectors = hnp.arrays(
    np.float64, (2, D), elements=st.floats(-1, 1).filter(lambda v: v == 0 or abs(v) > 1e-3)
).map(torch.from_numpy)


def test_values() -> None:
    a, b = random(B, D), random(B, D, seed=1)
    torch.testing.assert_close(global_loss(a, b), 1 - cosine_similarity(a, b, dim=-1))
    right = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    torch.testing.assert_close(cosine_distance(right, other), torch.tensor([0.0, 1.0, 2.0]))


def test_local_loss_is_the_mean_over_valid_boxes() -> None:
    f, labels, mask = random(B, M, D), random(B, M, D, seed=1), mask_of(1, 3, 4)
    per_box = local_loss(f, labels, mask)
    distances = 1 - cosine_similarity(f, labels, dim=-1)
    assert per_box.shape == (B, M) and not per_box[mask == 0].any()
    expected = torch.stack([distances[0, :1].mean(), distances[1, :3].mean(), distances[2].mean()])
    torch.testing.assert_close(local_mean(per_box, mask), expected)


@pytest.mark.parametrize("loss", [cosine_distance, global_loss])
def test_gradients_against_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = (random(B, D).requires_grad_(), random(B, D, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_local_gradients_against_finite_differences() -> None:
    mask = mask_of(0, 2, 4)

    def omega(f: Tensor, labels: Tensor) -> Tensor:
        return local_mean(local_loss(f, labels, mask), mask)

    inputs = (random(B, M, D).requires_grad_(), random(B, M, D, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(omega, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("zero", ["first", "second", "both"])
def test_zero_vectors_are_orthogonal_with_finite_gradients(zero: str, dtype: torch.dtype) -> None:
    a, b = random(B, D).to(dtype), random(B, D, seed=1).to(dtype)
    a = (a * (zero == "second")).requires_grad_()
    b = (b * (zero == "first")).requires_grad_()
    distance = cosine_distance(a, b)
    assert distance.tolist() == [1.0] * B
    gradients = torch.autograd.grad(distance.sum(), (a, b))
    # half precision rounds to infinity what float32 holds: the slope at 0 is 1 / sqrt(guard)
    if dtype != torch.float16:
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert not any(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_large_and_small_vectors(dtype: torch.dtype) -> None:
    a, b = random(B, 768).to(dtype), random(B, 768, seed=1).to(dtype)
    exact = cosine_distance(a.double(), b.double()).float()
    # squares of these leave the range of half precision at either end
    for scale in (2.0**-10, 1.0, 2.0**8):
        distance = cosine_distance(a * scale, b * scale)
        torch.testing.assert_close(distance, exact, rtol=0, atol=2e-3)


def test_no_valid_box_gives_zero_and_a_zero_gradient() -> None:
    f, mask = random(B, M, D).requires_grad_(), mask_of(0, 0, 2)
    mean = local_mean(local_loss(f, random(B, M, D, seed=1), mask), mask)
    (gradient,) = torch.autograd.grad(mean.sum(), f)
    assert mean[:2].tolist() == [0, 0] and mean[2] > 0
    assert not gradient[:2].any() and gradient[2, :2].any() and not gradient[2, 2:].any()


@untimed
@given(vectors)
def test_range_and_symmetry(pair: Tensor) -> None:
    distance = cosine_distance(pair[0], pair[1])
    assert -1e-9 <= distance <= 2 + 1e-9
    torch.testing.assert_close(distance, cosine_distance(pair[1], pair[0]))
    if pair[0].any():
        assert cosine_distance(pair[0], pair[0]) < 1e-5
        assert cosine_distance(pair[0], -pair[0]) > 2 - 1e-5


@untimed
@given(vectors, st.floats(1e-2, 1e6), st.floats(1e-2, 1e6))
def test_scale_does_not_matter(pair: Tensor, first: float, second: float) -> None:
    scaled = cosine_distance(first * pair[0], second * pair[1])
    # the guard inside the root weighs 1e-12 against norms of at least 1e-10
    torch.testing.assert_close(scaled, cosine_distance(pair[0], pair[1]), rtol=0, atol=2e-2)


def test_an_image_does_not_depend_on_its_batch() -> None:
    f = random(B, M, D, dtype=torch.float32).requires_grad_()
    labels, mask = random(B, M, D, seed=1, dtype=torch.float32), mask_of(0, 2, 4).float()
    whole = local_mean(local_loss(f, labels, mask), mask)
    (gradient,) = torch.autograd.grad(whole.sum(), f)
    for k in range(B):
        alone_f = f[k : k + 1].detach().requires_grad_()
        per_box = local_loss(alone_f, labels[k : k + 1], mask[k : k + 1])
        alone = local_mean(per_box, mask[k : k + 1])
        (alone_gradient,) = torch.autograd.grad(alone.sum(), alone_f)
        torch.testing.assert_close(alone[0], whole[k], rtol=0, atol=0)
        torch.testing.assert_close(alone_gradient[0], gradient[k], rtol=0, atol=0)
