"""How close two sets of images are in a feature space.

FID by torchmetrics on given features (Heusel et al. 2017); KID (Binkowski et al. 2018), precision
and recall (Kynkaanniemi et al. 2019) in torch, as no library takes raw features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hcma_fast.errors import InputError

Features = NDArray[np.float32]
"""(N, D), one row per image or crop"""
_CHUNK = 4096
NEIGHBOURS = 3


class _Given(nn.Module):
    """Stands where torchmetrics expects a feature network, and takes features as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_features(features: Features, ids: Sequence[str], what: str) -> None:
    """Refuse features that would make every score meaningless.

    Args:
        ids: the image of each row.

    Raises:
        InputError: another number of rows than ids, or a value that is not finite.
    """
    if features.ndim != 2 or len(features) != len(ids):
        raise InputError(
            f"the features of {what} are not one row per image",
            value=features.shape,
            remedy=f"Expected {len(ids)} rows: compute them again with --force.",
        )
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise InputError(
            f"the features of {what} are not finite for {len(bad)} images",
            value=ids[int(bad[0])],
            remedy="Look at the image, and compute the features again with --force.",
        )


def check_count(count: int, width: int) -> None:
    """Refuse FID where the covariance of ``width`` features cannot have full rank.

    Raises:
        InputError: not more images than features.
    """
    if count <= width:
        raise InputError(
            f"FID on {width} features needs more images than that for the covariance",
            value=count,
            remedy="Use more images, or leave fid out of --metric (kid works on few).",
        )


def fid(real: Iterable[Features], generated: Iterable[Features], width: int) -> float:
    """|mu_r - mu_g|^2 + tr(C_r + C_g - 2 (C_r C_g)^(1/2)), computed in float64.

    Args:
        real, generated: features in parts, (n, width) each; only one part is held at a time.

    Raises:
        InputError: see :func:`check_count`.
    """
    # seconds of imports, for those who use it
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(width))
    metric.set_dtype(torch.float64)
    for parts, is_real in ((real, True), (generated, False)):
        for part in parts:
            if len(part):
                metric.update(torch.from_numpy(part).double(), real=is_real)
    for count in (metric.real_features_num_samples, metric.fake_features_num_samples):
        check_count(int(count), width)
    return max(float(metric.compute()), 0.0)


def kid(real: Features, generated: Features) -> float:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 over all pairs; may be below 0.

    Raises:
        InputError: fewer than two rows, or the widths differ.
    """
    width = _width(real, generated)
    if min(len(real), len(generated)) < 2:
        raise InputError("KID needs two images or more", value=len(real), remedy="Use more.")

    def total(a: Features, b: Features) -> float:
        right = torch.from_numpy(b).double()
        return sum(
            float(((torch.from_numpy(a[i : i + _CHUNK]).double() @ right.T / width + 1) ** 3).sum())
            for i in range(0, len(a), _CHUNK)
        )

    def within(a: Features) -> float:
        norms = (torch.from_numpy(a).double() ** 2).sum(1)
        own = float(((norms / width + 1) ** 3).sum())
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    mixed = total(real, generated) / (len(real) * len(generated))
    return within(real) + within(generated) - 2 * mixed


def precision_recall(real: Features, generated: Features) -> tuple[float, float]:
    """Share of generated images inside the real ones' manifold, and the other way round.

    A manifold is the union of balls around its points that reach to the third neighbour.

    Raises:
        InputError: fewer than four rows, or the widths differ.
    """
    _width(real, generated)
    if min(len(real), len(generated)) <= NEIGHBOURS:
        raise InputError(
            "precision and recall need more than three images", value=len(real), remedy="Use more."
        )
    return _coverage(generated, real), _coverage(real, generated)


def _coverage(points: Features, manifold: Features) -> float:
    there = torch.from_numpy(manifold).double()
    radii = torch.cat(
        [
            # the nearest neighbour is the point itself
            torch.cdist(part, there).kthvalue(NEIGHBOURS + 1).values
            for part in there.split(_CHUNK)
        ]
    )
    inside = [
        (torch.cdist(part, there) <= radii).any(1)
        for part in torch.from_numpy(points).double().split(_CHUNK)
    ]
    return float(torch.cat(inside).double().mean())


def _width(real: Features, generated: Features) -> int:
    if real.shape[1] != generated.shape[1]:
        raise InputError(
            "real and generated features have different widths",
            value=(real.shape[1], generated.shape[1]),
            remedy="Compute both with the same network.",
        )
    return int(real.shape[1])
