"""What a model is put together from beside its base: files of GLIGEN's layers and of a VAE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hcma_fast.errors import WeightsError
from hcma_fast.files import is_file

#: names under which the files that are no folder's are opened and hashed
MODEL_FILE, GLIGEN_FILE, VAE_FILE = (
    f"{what}.safetensors" for what in ("model", "gligen", "other-vae")
)
_MOST_SKIPPED = 12


def lora_file(number: int) -> str:
    """The name under which a LoRA is opened."""
    return f"lora-{number:02}.safetensors"


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and how much of it is added."""

    path: str | Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise WeightsError(
                "the scale of a LoRA must be a finite number",
                value=self.scale,
                remedy="Write FILE:0.8, or FILE alone for 1.",
            )

    @classmethod
    def parse(cls, text: str | Path | Lora) -> Lora:
        """From ``FILE`` or ``FILE:SCALE``.

        Raises:
            WeightsError: the scale is not finite.
        """
        if isinstance(text, Lora):
            return text
        path, colon, scale = str(text).rpartition(":")
        if colon and not is_file(str(text)):
            try:
                return cls(path, float(scale))
            except ValueError:
                pass  # a colon of the path
        return cls(text)


@dataclass(frozen=True)
class ModelOptions:
    """What is laid over a model: parts from files of their own, and how its text is read."""

    gligen: str | Path | None = None
    """file with GLIGEN's layers: ComfyUI's adapter, or a GLIGEN checkpoint"""
    vae: str | Path | None = None
    """file of another VAE"""
    clip_skip: int | None = None
    """layers of the text encoder, counted from its end, from which the caption is read: 1 is all
    of them; None is the model's own"""

    loras: tuple[Lora, ...] = ()
    """added to the base weights, each at its scale"""

    def __post_init__(self) -> None:
        skip = self.clip_skip
        if skip is not None and (type(skip) is not int or not 1 <= skip <= _MOST_SKIPPED):
            raise WeightsError(
                f"clip_skip must be a whole number from 1 to {_MOST_SKIPPED}",
                value=skip,
                remedy="Use 1 for all layers of the text encoder, 2 to leave out the last one.",
            )

    def files(self) -> dict[str, Path]:
        """Its files by the names above, each checked to be there."""
        given = {GLIGEN_FILE: self.gligen, VAE_FILE: self.vae}
        given |= {lora_file(number): lora.path for number, lora in enumerate(self.loras)}
        found = {name: Path(path).expanduser() for name, path in given.items() if path is not None}
        for path in found.values():
            if not is_file(path):
                raise WeightsError(
                    "there is no such file",
                    value=str(path),
                    remedy="Give a .safetensors, .ckpt, .pth or .bin file.",
                )
        return found


DEFAULTS = ModelOptions()
"""The model as it is."""
