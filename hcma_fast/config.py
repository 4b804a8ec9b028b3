"""Configuration: constants, presets and the settings that a checkpoint carries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from hcma_fast.errors import SettingsError, UsageError
from hcma_fast.scalars import plain, plain_pair

MAX_OBJECTS = 30
"""Boxes an image may have; layouts are padded to this many (GLIGEN's limit)."""

MAX_SEED = 2**64 - 1
"""Seeds are whole numbers from 0 to this."""

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


def check_backend(name: str | None, *others: str) -> None:
    """Refuse a name that is none of ``BACKENDS``, nor one of ``others``.

    Raises:
        UsageError: with the names that are possible.
    """
    possible = (*others, *BACKENDS)
    if name not in possible:
        raise UsageError("unknown backend", value=name, remedy=f"Backends: {', '.join(possible)}.")


GRAD_BACKENDS = ("eager", "compile", "triton", "onnx")
"""What can compute the alignment gradient in place of the backend itself."""


def cache_root() -> Path:
    """Where engines are kept: ``$HCMA_FAST_CACHE``, or the platform's cache folder of the user."""
    given = os.environ.get("HCMA_FAST_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("hcma-fast"))


Sampler = Literal["plms", "ddim"]
"""Solvers by name, see ``sampling.solvers``; PLMS is the paper's."""

RegionMode = Literal["coverage+fourier", "coverage", "fourier"]


@dataclass(frozen=True)
class Asked:
    """How a field is asked for where it has words of its own; metadata of ``Annotated``."""

    option: str | None = ""
    """command-line option; "" for the field's name with dashes, None for no option"""
    metavar: str | None = None
    default: str | None = None
    """what the help says of the default, where it is not the field's"""


NO_OPTION = Asked(option=None)

Whole = Annotated[int, BeforeValidator(plain)]
Real = Annotated[FiniteFloat, BeforeValidator(plain)]
Window = Annotated[tuple[FiniteFloat, FiniteFloat], BeforeValidator(plain_pair)]


class Settings(BaseModel):
    """Immutable settings; numpy's numbers are taken like Python's.

    Raises:
        SettingsError: an unknown name, or a value of a wrong type or out of its range; from
            ``model_validate`` pydantic's ValidationError, as of any model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(error) from error

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some values replaced, which are checked like those of a new one."""
        if update is None:
            return super().model_copy(deep=deep)
        try:
            return type(self)(**{**dict(self), **update})
        except TypeError as error:
            raise SettingsError(
                "update must map names to values", value=update, remedy='Write {"eta0": 1.0}.'
            ) from error


def settings_error(error: ValidationError) -> SettingsError:
    """The first problem that pydantic found."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fault, remedy = f"{where} is no setting of {error.title}", "Check its name."
    elif where:
        fault = f"{where} cannot have this value: {first['msg']}"
        remedy = "Leave it out for the default."
    else:
        # of a check over several values, whose message names them
        fault, remedy = first["msg"].removeprefix("Value error, "), "Change one of them."
    return SettingsError(fault, value=first["input"], remedy=remedy)


_WIDEST, _DEEPEST = 2**14, 128
"""Bounds of an aligner's shape: a damaged config must not fill the memory"""


class AlignerConfig(Settings):
    """Shape of the aligner: ViT and the two heads (paper section 3.3; defaults are the paper's)."""

    latent_channels: Whole = Field(4, gt=0, le=_WIDEST)
    latent_size: Whole = Field(
        64, gt=0, le=_WIDEST, description="side of the latent that the positions are learned for"
    )
    patch_size: Whole = Field(4, gt=0, le=_WIDEST)
    token_width: Whole = Field(64, gt=0, le=_WIDEST, description="d_k, width of a projected patch")
    width: Whole = Field(512, gt=0, le=_WIDEST, description="d_v, width of the ViT")
    depth: Whole = Field(6, gt=0, le=_DEEPEST)
    heads: Whole = Field(8, gt=0, le=_WIDEST)
    text_width: Whole = Field(
        768, gt=0, le=_WIDEST, description="d_t = d_l, width of the text embedding"
    )
    region: RegionMode = "coverage+fourier"
    time_conditioning: Literal["none", "adaln"] = "none"
    vae_sha256: str | None = Field(
        None, description="of the VAE's encoder that it was trained with"
    )
    text_sha256: str | None = Field(None, description="of the text encoder and its tokenizer")

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


class AlignmentSettings(Settings):
    """How far and when the latent is moved (Eq. 8): eta_t = eta0 * sqrt(1 - abar_t) in the window.

    ``window`` holds shares of the steps, [start, end). ``normalized`` makes eta_t the length of the
    step as a share of the latent's norm. ``grounding_beta`` is the share of the steps with gated
    attention.
    """

    eta0: Real = Field(1.0, ge=0, description="Rate of the alignment; 0 switches it off.")
    window: Annotated[Window, Asked("--align-window", metavar="START END")] = Field(
        (0.0, 1.0), description="When the alignment acts, in shares of the steps: 0.4 0.7."
    )
    lambda_global: Real = Field(1.0, ge=0, description="Weight of the caption's alignment.")
    lambda_local: Real = Field(1.0, ge=0, description="Weight of the boxes' alignment.")
    normalized: Annotated[bool, NO_OPTION] = False
    grounding_beta: Real = Field(
        1.0, ge=0, le=1, description="Share of the steps that see the boxes."
    )
    guidance_scale: Real = Field(
        7.5, ge=1, description="Weight of the guidance; 1 switches it off."
    )

    @model_validator(mode="after")
    def _check(self) -> AlignmentSettings:
        if not 0 <= self.window[0] <= self.window[1] <= 1:
            raise ValueError("window must hold two shares of the steps, 0 <= start <= end <= 1")
        return self


class SettingsChange(AlignmentSettings):
    """What a request changes of the checkpoint's settings: the fields that were given, no others.

    Made from names and values, or from an :class:`AlignmentSettings`, which gives all fields.
    """

    @classmethod
    def of(cls, **values: Any) -> Self:
        """From values of which those that are None are left out."""
        return cls(**{name: value for name, value in values.items() if value is not None})

    @property
    def given(self) -> dict[str, Any]:
        """The changes by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def over(self, defaults: AlignmentSettings) -> AlignmentSettings:
        """``defaults`` with these changes; both have been checked, so nothing is checked again."""
        return AlignmentSettings.model_construct(**{**dict(defaults), **self.given})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with more changes, or others."""
        return type(self)(**{**self.given, **(update or {})})

    @model_serializer(mode="wrap")
    def _only_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in serialize(self).items() if k in self.model_fields_set}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SettingsChange) and self.given == other.given

    def __hash__(self) -> int:
        return hash(frozenset(self.given.items()))
