"""How stage 1 runs, and which aligner fits which cache."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hcma_fast.config import AlignerConfig
from hcma_fast.errors import WeightsError
from hcma_fast.train.cache import CacheHeader


class AlignerTraining(BaseModel):
    """How stage 1 runs; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(60, gt=0)
    batch: int = Field(1024, gt=0, description="images a step, over all processes")
    micro_batch: int = Field(128, gt=0, description="images that a process takes at once")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    decoupled_decay: bool = Field(False, description="AdamW instead of Adam")
    warmup: int = Field(0, ge=0, description="steps")
    cosine: bool = False
    clip_norm: float | None = Field(None, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    bf16: bool = False
    seed: int = Field(0, ge=0)
    max_steps: int | None = Field(None, gt=0, description="stop after so many, if epochs are more")
    # what may differ between a run and its continuation
    workers: int = Field(0, ge=0)
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0, description="steps; besides, at each epoch's end")
    keep: int = Field(2, gt=0, description="states kept")
    tensorboard: bool = True


FREE = {"workers", "log_every", "checkpoint_every", "keep", "tensorboard"}
"""Settings that leave the weights as they are"""

TINY = AlignerTraining(
    epochs=4,
    batch=64,
    micro_batch=64,
    decoupled_decay=True,
    warmup=100,
    cosine=True,
    clip_norm=1.0,
    ema_decay=0.995,
    log_every=50,
)
"""Settings for the preset `tiny`"""


def architecture(preset: Literal["tiny", "sd14"]) -> AlignerConfig:
    """The aligner of a preset: the paper's, or 0.9 M parameters for a 16 x 16 latent."""
    if preset == "sd14":
        return AlignerConfig()
    return AlignerConfig(latent_size=16, patch_size=2, width=128, depth=4, heads=4, text_width=128)


def check_fits(config: AlignerConfig, header: CacheHeader, what: str) -> None:
    """Can an aligner of this shape read the cache's latents and texts?

    Args:
        what: the aligner's name in the message.

    Raises:
        WeightsError: no.
    """
    channels, height, _ = header.latent_shape
    for name, wanted, found in (
        ("latent_channels", config.latent_channels, channels),
        ("latent_size", config.latent_size, height),
        ("text_width", config.text_width, header.text_width),
    ):
        if wanted != found:
            raise WeightsError(
                f"{what} does not fit this cache: its {name} is {wanted}, the cache's {found}",
                value=header.preset,
                remedy="Make the cache with the encoders of the model that the aligner is for, or "
                "choose another --preset.",
            )
