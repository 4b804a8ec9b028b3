"""Configuration: constants, presets and the settings that a checkpoint carries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_OBJECTS = 30
"""Boxes an image may have; layouts are padded to this many (GLIGEN's limit)."""

TOKEN_LENGTH = 77
"""Tokens of CLIP's text encoder, start and end token included."""

PRESETS: dict[str, Path] = {"tiny": Path(__file__).parent / "assets" / "tiny"}
"""Checkpoints that are embedded in the package."""

BACKENDS = (
    *("eager", "onnxruntime", "onnxruntime-tensorrt", "openvino", "torch-compile"),
    *("tensorrt", "tensorrt-rtx"),
)
"""Backends that the pipeline runs on: torch eager is the reference."""
_DEVICES = {
    "eager": ("cpu", "cuda", "mps"),
    "onnxruntime": ("cpu", "cuda"),
    "onnxruntime-tensorrt": ("cuda",),
    "torch-compile": ("cpu", "cuda"),
    "tensorrt": ("cuda",),
    "tensorrt-rtx": ("cuda",),
}


def devices_of(backend: str) -> tuple[str, ...]:
    """Kinds of device that a backend runs on; the first is where it runs by default."""
    return _DEVICES.get(backend, ("cpu",))


GRAD_BACKENDS = ("eager", "compile", "triton", "onnx")
"""What can compute the alignment gradient in place of the backend itself."""


def cache_root() -> Path:
    """Where engines are kept: ``$HCMA_FAST_CACHE``, or the platform's cache folder of the user."""
    given = os.environ.get("HCMA_FAST_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("hcma-fast"))


RegionMode = Literal["coverage+fourier", "coverage", "fourier"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_WIDEST, _DEEPEST = 2**14, 128
"""Bounds of an aligner's shape: a damaged config must not fill the memory"""


class AlignerConfig(_Frozen):
    """Shape of the aligner: ViT and the two heads (paper section 3.3; defaults are the paper's)."""

    latent_channels: int = Field(4, gt=0, le=_WIDEST)
    latent_size: int = Field(
        64, gt=0, le=_WIDEST, description="side of the latent that the positions are learned for"
    )
    patch_size: int = Field(4, gt=0, le=_WIDEST)
    token_width: int = Field(64, gt=0, le=_WIDEST, description="d_k, width of a projected patch")
    width: int = Field(512, gt=0, le=_WIDEST, description="d_v, width of the ViT")
    depth: int = Field(6, gt=0, le=_DEEPEST)
    heads: int = Field(8, gt=0, le=_WIDEST)
    text_width: int = Field(
        768, gt=0, le=_WIDEST, description="d_t = d_l, width of the text embedding"
    )
    region: RegionMode = "coverage+fourier"
    time_conditioning: Literal["none", "adaln"] = "none"

    @model_validator(mode="after")
    def _check(self) -> AlignerConfig:
        if self.latent_size % self.patch_size:
            raise ValueError("latent_size must be a multiple of patch_size")
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")
        return self

    @property
    def grid(self) -> int:
        """Cells along a side of the region map."""
        return self.latent_size // self.patch_size


class AlignmentSettings(_Frozen):
    """How far and when the latent is moved (Eq. 8): eta_t = eta0 * sqrt(1 - abar_t) in the window.

    ``window`` holds shares of the steps, [start, end). ``normalized`` makes eta_t the length of the
    step as a share of the latent's norm. ``grounding_beta`` is the share of the steps with gated
    attention.
    """

    eta0: float = Field(1.0, ge=0)
    window: tuple[float, float] = (0.0, 1.0)
    lambda_global: float = Field(1.0, ge=0)
    lambda_local: float = Field(1.0, ge=0)
    normalized: bool = False
    grounding_beta: float = Field(1.0, ge=0, le=1)
    guidance_scale: float = Field(7.5, ge=1)

    @model_validator(mode="after")
    def _check(self) -> AlignmentSettings:
        if not 0 <= self.window[0] <= self.window[1] <= 1:
            raise ValueError("window must hold two shares of the steps, 0 <= start <= end <= 1")
        return self
