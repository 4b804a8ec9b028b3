"""The two alignment losses of HCMA, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-12
_HALF = (torch.float16, torch.bfloat16)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(a, b) over the last dimension; a zero vector counts as orthogonal.

    The norms are guarded inside the root, so value and gradient are finite at zero vectors.

    Args:
        a, b: (..., D), broadcastable. Returns (...,) in [0, 2] up to rounding; float32 for half
        precision, whose range holds neither the guard nor the squares.
    """
    if a.dtype in _HALF:
        a = a.float()
    if b.dtype in _HALF:
        b = b.float()
    # a floor, not a summand: onnxscript's optimizer takes x + 1e-12 for x, and 0 becomes NaN
    norms = (a * a).sum(-1).clamp(min=_FLOOR).rsqrt() * (b * b).sum(-1).clamp(min=_FLOOR).rsqrt()
    return 1 - (a * b).sum(-1) * norms


def global_loss(f_global: Tensor, caption: Tensor) -> Tensor:
    """Omega^G (paper Eq. 6): distance of the image feature to the caption embedding.

    Args:
        f_global, caption: (B, d_t). Returns (B,) in [0, 2].
    """
    return cosine_distance(f_global, caption)


def local_loss(f_local: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The summands of Omega^L (paper Eq. 7), one per box; 0 where ``mask`` is 0.

    Args:
        f_local, labels: (B, M, d_l); mask: (B, M) of 0 and 1. Returns (B, M).
    """
    return cosine_distance(f_local, labels) * mask


def local_mean(per_box: Tensor, mask: Tensor) -> Tensor:
    """Omega^L (paper Eq. 7): mean over the valid boxes; 0 for an image without boxes.

    Args:
        per_box: (B, M) from :func:`local_loss`; mask: (B, M). Returns (B,).
    """
    return per_box.sum(-1) / mask.sum(-1).clamp(min=1)
