"""FID, KID, precision and recall on features, and what is refused; bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from hcma_fast.bench.quality.metrics.fidelity import (
    check_count,
    check_features,
    fid,
    kid,
    precision_recall,
)
from hcma_fast.bench.shared.bootstrap import compare, estimate
from hcma_fast.errors import InputError


def normal(count: int, width: int = 6, mean: float = 0.0, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width))
    return (rng.normal(size=(count, width)) @ mix + mean).astype(np.float32)


def test_fid_is_the_formula_and_streams() -> None:
    real, made = normal(300), normal(200, mean=0.5, seed=1)
    a, b = np.cov(real, rowvar=False), np.cov(made, rowvar=False)
    means = real.mean(0, dtype=np.float64) - made.mean(0, dtype=np.float64)
    expected = means @ means + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert fid([real], [made], 6) == pytest.approx(expected, rel=1e-5)
    parts = fid(np.array_split(real, 7), [made[:50], made[50:], made[:0]], 6)
    assert parts == pytest.approx(expected, rel=1e-5)
    assert fid([real], [real], 6) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_estimate() -> None:
    real, made = normal(40), normal(30, mean=0.5, seed=1)

    def kernel(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
        return float((x.astype(np.float64) @ y / 6 + 1) ** 3)

    within = [
        np.mean([kernel(x, y) for i, x in enumerate(some) for j, y in enumerate(some) if i != j])
        for some in (real, made)
    ]
    between = np.mean([kernel(x, y) for x in real for y in made])
    assert kid(real, made) == pytest.approx(sum(within) - 2 * between, rel=1e-9)
    same = [kid(normal(60, seed=i), normal(60, seed=100 + i)) for i in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 40**0.5


def test_precision_and_recall_tell_missing_modes_from_wrong_ones() -> None:
    rng = np.random.default_rng(0)
    left = rng.normal(size=(60, 2)).astype(np.float32)
    right = left + np.float32(100)
    both = np.concatenate([left, right])
    near = left + rng.normal(size=left.shape).astype(np.float32) * np.float32(0.01)
    precision, recall = precision_recall(both, near)
    assert precision == 1 and recall == pytest.approx(0.5, abs=0.02)
    precision, recall = precision_recall(left, both)
    assert precision == pytest.approx(0.5, abs=0.02) and recall == 1


def test_bad_features_are_refused() -> None:
    ids = [f"image-{i}" for i in range(10)]
    features = normal(10)
    check_features(features, ids, "hcma")
    features[7, 2] = np.nan
    with pytest.raises(InputError, match="image-7"):
        check_features(features, ids, "hcma")
    with pytest.raises(InputError, match="one row per image"):
        check_features(features[:9], ids, "hcma")
    with pytest.raises(InputError, match="covariance"):
        check_count(256, 256)
    with pytest.raises(InputError, match="covariance"):
        fid([normal(100)], [normal(6)], 6)
    with pytest.raises(InputError, match="widths"):
        kid(normal(10, 5), normal(10, 6))
    for few in (precision_recall, kid):
        with pytest.raises(InputError):
            few(normal(1), normal(1))


def test_interval_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = estimate(lambda chosen: float(values[chosen].mean()), 400)
    margin = 1.96 * values.std() / 20
    assert found.interval == pytest.approx((found.value - margin, found.value + margin), abs=0.02)
    symmetric = estimate(lambda chosen: float(values[chosen].mean()), 400, plug_in=False)
    assert symmetric.interval == pytest.approx(found.interval, abs=0.02)
    assert estimate(lambda _: 1.0, 400, resamples=0).interval is None
    assert estimate(lambda _: float("nan"), 400).interval is None


def test_pairing_finds_a_difference_that_intervals_hide() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(size=200)
    better = hard + 0.1 + 0.05 * rng.normal(size=200)

    def mean(values: NDArray[np.float64]) -> object:
        return lambda chosen: float(values[chosen].mean())

    found = compare("m", mean(better), mean(hard), 200)  # type: ignore[arg-type]
    assert found.difference == pytest.approx(0.1, abs=0.02)
    assert found.interval[0] > 0 and found.p_value < 0.01
    single = estimate(mean(hard), 200)  # type: ignore[arg-type]
    assert single.interval is not None and single.interval[1] > float(better.mean())
    nothing = compare("m", mean(hard), mean(hard), 200)  # type: ignore[arg-type]
    assert nothing.p_value == 1 and nothing.difference == 0
    with pytest.raises(InputError, match="no value"):
        compare("m", lambda _: float("nan"), lambda _: 0.0, 10)


@pytest.mark.parametrize("seed", range(3))
def test_one_image_of_many_makes_no_significant_difference(seed: int) -> None:
    """A third of the resamples have not got it, and show no difference at all."""
    values = np.random.default_rng(seed).random(500)
    better = values.copy()
    better[7] += 1
    found = compare(
        "m", lambda chosen: float(better[chosen].mean()), lambda c: float(values[c].mean()), 500
    )
    assert found.difference == pytest.approx(1 / 500)
    assert found.p_value > 0.5 and found.interval[0] <= 0
