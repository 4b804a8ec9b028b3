"""The model of the larger stages: sd14 with random weights, or tiny where sizes are small."""

from __future__ import annotations

from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.models.checkpoint.random_sd14 import RandomSD14

EVERY_PART = ("text", "unet", "vae", "aligner")


def model_parts(place: str, *, small: bool, parts: tuple[str, ...] = EVERY_PART) -> Components:
    """The parts, those that are named with weights on the device ``place``."""
    return load_components("tiny") if small else RandomSD14().drawn(*parts, device=place)
