"""Whole models in one file: of Stable Diffusion 1.x as its own code saves it, and of GLIGEN."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hcma_fast.errors import Remedy, WeightsError
from hcma_fast.models.checkpoint.configs import PartName
from hcma_fast.models.checkpoint.formats.architecture import (
    text_config,
    unet_config,
    unet_levels,
    vae_config,
)
from hcma_fast.models.checkpoint.formats.foreign import refuse_foreign, refuse_part
from hcma_fast.models.checkpoint.formats.names import unet_names, vae_names, with_prefix
from hcma_fast.models.checkpoint.formats.tensor_file import Shape, TensorFile
from hcma_fast.models.checkpoint.parts import PartPlan
from hcma_fast.models.checkpoint.weight_files import WeightFile, list_names

_FIRST_UNET_KEY = "input_blocks.0.0.weight"
_VAE_LEVEL = re.compile(r"encoder\.down\.(\d+)\.")
_TEXT_MODEL = "text_model."
#: tensors of training and of the noise schedule: the model is complete without them
_HARMLESS = re.compile(
    r"(model_)?ema[._].*|model_ema\b.*|.*position_ids"
    r"|(diffusion\.)?(betas|logvar|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*"
    r"|lvlb_weights|scale_factor)"
    r"|(first_stage_model|autoencoder)\.loss\..*|loss\..*|global_step|embedding_manager\..*"
    r"|cond_stage_model\.(logit_scale|text_projection.*|transformer\.text_projection\.weight)"
    r"|text_encoder\.(logit_scale|text_projection.*)"
)


@dataclass(frozen=True)
class _Style:
    """How one program names a whole model: the prefixes of its parts."""

    name: str
    unet: str
    vae: str
    text: tuple[str, ...]


_STYLES = (
    _Style(
        "single file of Stable Diffusion 1.x",
        "model.diffusion_model.",
        "first_stage_model.",
        ("cond_stage_model.transformer.",),
    ),
    _Style(
        "original GLIGEN checkpoint",
        "model.",
        "autoencoder.",
        ("text_encoder.transformer.", "text_encoder."),
    ),
)


@dataclass(frozen=True)
class SingleFile:
    """What was recognised in a file."""

    format: str
    plans: dict[PartName, PartPlan]
    unknown: tuple[str, ...]
    """keys that no part takes, and that are not known as harmless"""
    ignored: int
    """tensors that are known as harmless"""


def read_single_file(path: Path, *, optional: Iterable[PartName] = ()) -> SingleFile:
    """Recognise a whole model in a safetensors file.

    Args:
        optional: parts that come from elsewhere, which the file need not have.

    Raises:
        WeightsError: it is of another kind of model, or lacks a part.
    """
    file = TensorFile.read(path)
    refuse_foreign(file)
    style = next((s for s in _STYLES if s.unet + _FIRST_UNET_KEY in file.shapes), None)
    if style is None:
        raise refuse_part(file)
    plans: dict[PartName, PartPlan] = {}
    unet = _under(file.shapes, style.unet)
    names = with_prefix(unet_names(unet, *_levels(unet)), style.unet)
    plans["unet"] = PartPlan(unet_config(unet, path), (WeightFile(path, names),))
    vae = _under(file.shapes, style.vae)
    if vae:
        plans["vae"] = vae_plan(path, vae, style.vae)
    prefix = next((p for p in style.text if any(key.startswith(p) for key in file.shapes)), None)
    if prefix is not None:
        text = _under(file.shapes, prefix)
        words = {key: key.removeprefix(_TEXT_MODEL) for key in text}
        config = text_config({words[key]: shape for key, shape in text.items()}, path)
        plans["text_encoder"] = PartPlan(config, (WeightFile(path, with_prefix(words, prefix)),))
    expected: tuple[PartName, ...] = ("vae", "text_encoder")
    if missing := [part for part in expected if part not in plans and part not in optional]:
        raise WeightsError(
            f"this {style.name} has no {' and no '.join(missing)}",
            value=str(path),
            remedy=Remedy(
                python="Give a whole base model, and this file as gligen= if it holds GLIGEN's "
                "layers.",
                command="Give a whole base model with --model, and this file with --gligen if it "
                "holds GLIGEN's layers.",
            ),
        )
    taken = {key for plan in plans.values() for file in plan.weights for key in file.names or ()}
    rest = [key for key in file.shapes if key not in taken]
    unknown = tuple(sorted(key for key in rest if not is_harmless(key)))
    return SingleFile(style.name, plans, unknown, len(rest) - len(unknown))


def vae_plan(path: Path, shapes: Mapping[str, Shape], prefix: str = "") -> PartPlan:
    """A VAE whose keys have this prefix in the file; ``shapes`` are those without it.

    Raises:
        WeightsError: it is not a VAE of SD 1.x.
    """
    levels = 1 + max((int(m[1]) for key in shapes if (m := _VAE_LEVEL.match(key))), default=0)
    names = with_prefix(vae_names(shapes, levels), prefix)
    return PartPlan(vae_config(shapes, path), (WeightFile(path, names),))


def read_vae_file(path: Path) -> PartPlan:
    """A VAE of its own, or that of a whole model.

    Raises:
        WeightsError: the file has none.
    """
    file = TensorFile.read(path)
    for prefix in (*(style.vae for style in _STYLES), ""):
        shapes = _under(file.shapes, prefix)
        if any(key.startswith("decoder.") for key in shapes):
            return vae_plan(path, shapes, prefix)
    refuse_foreign(file)
    raise WeightsError(
        f"there is no VAE in this file: {list_names(file.shapes)}",
        value=str(path),
        remedy="Give a VAE of Stable Diffusion 1.x, such as sd-vae-ft-mse.",
    )


def is_harmless(key: str) -> bool:
    """Is a tensor of this key of no use for drawing?"""
    return _HARMLESS.fullmatch(key) is not None


def refuse_unknown(unknown: Iterable[str], path: Path) -> None:
    """Refuse tensors that no part takes.

    Raises:
        WeightsError: names the first ten.
    """
    keys = sorted(unknown)
    if keys:
        raise WeightsError(
            f"no part of the model takes {list_names(keys)}",
            value=str(path),
            remedy="It is made for another program or model: use one of Stable Diffusion 1.x.",
        )


def _levels(unet: Mapping[str, Shape]) -> tuple[int, int]:
    try:
        return unet_levels(unet)
    except ValueError:
        return 0, 1  # the config says what is wrong with it


def _under(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {k.removeprefix(prefix): shape for k, shape in shapes.items() if k.startswith(prefix)}
