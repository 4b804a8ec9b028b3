"""Decoded images in the form that a caller asks for."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hcma_fast.errors import DivergenceError, UsageError

OutputType = Literal["pil", "np", "pt", "latent"]


def check_output_type(output_type: str) -> None:
    """Raises UsageError for what is not an :data:`OutputType`."""
    if not isinstance(output_type, str) or output_type not in get_args(OutputType):
        raise UsageError(
            "unknown output type",
            value=output_type,
            remedy=f"Use one of {', '.join(get_args(OutputType))}.",
        )


def to_unit_range(decoded: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's (B, 3, H, W), nominally in [-1, 1] -> in [0, 1], and which are finite, (B,).

    Looked at before the values are clamped: infinity would become white.
    """
    return (decoded / 2 + 0.5).clamp(0, 1), decoded.isfinite().flatten(1).all(1)


def pixels_diverged(where: str | None = None) -> DivergenceError:
    """The error of an image whose pixels are not finite, though its latent is."""
    return DivergenceError(
        "the decoded image has pixels that are not finite",
        value=where,
        remedy="The VAE's weights are damaged, or its precision is too narrow: check them, or "
        "decode in float32.",
    )


def require_finite(images: Tensor, finite: Tensor) -> Tensor:
    """``images``; raises DivergenceError where one is not finite, by number."""
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        raise pixels_diverged(f"image {', '.join(map(str, rows))} of {len(images)}")
    return images


def as_type(images: Tensor, output_type: OutputType) -> Any:
    """(B, 3, H, W) in [0, 1] as PIL images, an array or the tensor itself."""
    if output_type == "pt":
        return images
    return to_pil(images) if output_type == "pil" else to_array(images)


def to_array(images: Tensor) -> NDArray[np.float32]:
    """(B, 3, H, W) in [0, 1] on any device -> (B, H, W, 3)."""
    return cast("NDArray[np.float32]", images.permute(0, 2, 3, 1).cpu().numpy())


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] on any device -> an 8-bit RGB image each."""
    return [Image.fromarray((item * 255).round().astype(np.uint8)) for item in to_array(images)]
