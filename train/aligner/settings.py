"""How stage 1 runs, and which aligner fits which cache."""

from __future__ import annotations

from typing import Literal

from hcma_fast.config import AlignerConfig
from hcma_fast.errors import WeightsError
from hcma_fast.train.data.latent_cache import CacheHeader
from hcma_fast.train.loop.settings import Training


class AlignerTraining(Training):
    """How stage 1 runs; the defaults are the paper's."""


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
