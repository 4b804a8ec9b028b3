"""LoRA files, folded into the weights: W += scale * alpha / rank * up @ down.

kohya's names (``lora_unet_..._to_q.lora_down.weight``), peft's (``unet....to_q.lora_A.weight``) and
diffusers' older ones (``....processor.to_q_lora.down.weight``) are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hcma_fast.errors import WeightsError
from hcma_fast.files import parse_json
from hcma_fast.models.checkpoint.configs import PartName, foreign_error
from hcma_fast.models.checkpoint.formats.tensor_file import TensorFile
from hcma_fast.models.checkpoint.json_files import tell_once
from hcma_fast.models.checkpoint.weight_files import damage, list_names

Role = Literal["down", "up", "alpha"]
_Keys = dict[Role, str]
_REMEDY = "Use a LoRA of Stable Diffusion 1.x, in the names of kohya, peft or diffusers."
_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"\.lora_down\.weight$"), "down"),
    (re.compile(r"\.lora_up\.weight$"), "up"),
    (re.compile(r"\.lora_A\.(default\.)?weight$"), "down"),
    (re.compile(r"\.lora_B\.(default\.)?weight$"), "up"),
    (re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.down\.weight$"), "down"),
    (re.compile(r"(_lora|\.lora|\.lora_linear_layer)\.up\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)
#: other kinds of adapters, by a part of their keys
_OTHER_KINDS = {
    "hada_w1": "a LoHa",
    "lokr_w1": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoCon with a core tensor",
    "oft_": "an OFT",
}
#: what stands before a layer's name, and the part that it means; without one it is the UNet's
_STARTS: dict[str, PartName] = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "base_model.model.unet.": "unet",
    "base_model.model.text_encoder.": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
}
_PEFT = ".lora_A."
#: where diffusers stores peft's settings in a file's header
_METADATA = "lora_adapter_metadata"
_XL = ("lora_te1_", "lora_te2_", "text_encoder_2.")


def fold_lora(path: Path, scale: float, parts: Mapping[PartName, nn.Module]) -> int:
    """Add a LoRA to the weights of "unet" and "text_encoder"; how many layers it changed.

    Raises:
        WeightsError: it is another kind of adapter, of another model, or damaged.
    """
    file = TensorFile.read(path)
    _refuse_other_kinds(file)
    layers = {part: _layers(module) for part, module in parts.items()}
    places = {name: (entry, _find(name, layers)) for name, entry in _entries(file).items()}
    if lost := [name for name, (_, layer) in places.items() if layer is None]:
        raise WeightsError(
            f"the model has no layers for {list_names(lost)}", value=str(path), remedy=_REMEDY
        )
    for name, (keys, layer) in places.items():
        _check_shapes(name, keys, layer, file)
    with damage("the LoRA", path), safe_open(path, framework="pt", backend="pread") as tensors:
        alphas = _stored_alphas(tensors.metadata() or {}, path)
        if not alphas and any(
            _PEFT in keys["down"] and "alpha" not in keys for keys, _ in places.values()
        ):
            tell_once(
                "note: a LoRA file does not store its alpha, which peft keeps in "
                "adapter_config.json; its rank is taken. Give alpha / rank as FILE:SCALE."
            )
        for name, (keys, layer) in places.items():
            change = _change(keys, tensors, scale, alphas.get(_part_of(name)))
            if not bool(change.isfinite().all()):
                raise WeightsError(
                    f"the LoRA has values that are not finite in the layer {name}",
                    value=str(path),
                    remedy="It is damaged: download it again.",
                )
            with torch.no_grad():
                layer.weight += change.view(layer.weight.shape)
    return len(places)


def _refuse_other_kinds(file: TensorFile) -> None:
    for part, kind in _OTHER_KINDS.items():
        if any(part in key for key in file.shapes):
            raise WeightsError(
                f"this file is {kind}, and hcma-fast folds plain LoRA",
                value=str(file.path),
                remedy="Merge it into the model with the program that made it.",
            )
    if any(key.startswith(_XL) for key in file.shapes):
        raise foreign_error("a LoRA of Stable Diffusion XL", file.path)


def _entries(file: TensorFile) -> dict[str, _Keys]:
    """The layers that the file names, and the keys of their tensors.

    Raises:
        WeightsError: keys of no LoRA, or half of one.
    """
    found: dict[str, _Keys] = {}
    unknown = []
    for key in file.shapes:
        place = next(((pattern, role) for pattern, role in _ROLES if pattern.search(key)), None)
        if place is None:
            unknown.append(key)
        else:
            found.setdefault(place[0].sub("", key), {})[place[1]] = key
    halves = [name for name, keys in found.items() if not {"down", "up"} <= set(keys)]
    if unknown or halves or not found:
        problem = "has no down and up for" if halves and not unknown else "is no LoRA:"
        raise WeightsError(
            f"this file {problem} {list_names(unknown or halves)}",
            value=str(file.path),
            remedy=_REMEDY,
        )
    return found


def _layers(module: nn.Module) -> dict[str, Any]:
    """Layers with a weight by their names, dots as underscores: kohya's names have none."""
    return {
        name.replace(".", "_"): layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _find(name: str, layers: Mapping[PartName, Mapping[str, Any]]) -> Any:
    """The layer that a file calls ``name``; None if the model has none."""
    start = next((start for start in _STARTS if name.startswith(start)), "")
    rest = name[len(start) :].replace(".processor.", ".").replace(".", "_")
    flat = rest.removeprefix("text_model_")
    of_part = layers[_STARTS.get(start, "unet")]
    # the older names say to_out for its first layer
    return of_part.get(flat, of_part.get(f"{flat}_0"))


def _check_shapes(name: str, keys: _Keys, layer: Any, file: TensorFile) -> None:
    """Refuse a product of another shape than the layer's weight.

    Raises:
        WeightsError: names both.
    """
    down, up, weight = file.shapes[keys["down"]], file.shapes[keys["up"]], tuple(layer.weight.shape)
    fits = (
        len(down) in (2, len(weight))
        and math.prod(down[1:]) == math.prod(weight[1:])
        and up[:1] == weight[:1]
        and math.prod(up[1:]) == down[0] > 0
    )
    if not fits:
        raise WeightsError(
            f"the LoRA does not fit the layer {name}: down {list(down)} and up {list(up)}, where "
            f"the model has {list(weight)}",
            value=str(file.path),
            remedy=_REMEDY,
        )


def _stored_alphas(metadata: Mapping[str, str], path: Path) -> dict[PartName, float]:
    """The alpha of each part that diffusers stores in a file's header; empty where it does not.

    Raises:
        WeightsError: it is damaged, or the layers have alphas of their own or another law.
    """
    if (text := metadata.get(_METADATA)) is None:
        return {}
    values = parse_json(text, "the LoRA's metadata")
    if not isinstance(values, dict):
        values = {"metadata": values}
    for key, value in values.items():
        if key.endswith(("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")) and value:
            raise WeightsError(
                f"hcma-fast does not fold a LoRA with {key}",
                value=str(path),
                remedy="Merge it into the model with diffusers (fuse_lora), and load that.",
            )
    parts: tuple[PartName, ...] = ("unet", "text_encoder")
    found = {part: values[f"{part}.lora_alpha"] for part in parts if f"{part}.lora_alpha" in values}
    for value in found.values():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise WeightsError(
                "the LoRA's alpha is no number", value=f"{path}: {value!r}", remedy=_REMEDY
            )
    return found


def _part_of(name: str) -> PartName:
    return next((part for start, part in _STARTS.items() if name.startswith(start)), "unet")


def _change(keys: _Keys, tensors: Any, scale: float, stored: float | None) -> Tensor:
    """What is added to a weight, as (out, everything else); ``stored``: alpha by the header."""
    down, up = (tensors.get_tensor(keys[role]).float().flatten(1) for role in ("down", "up"))
    rank = len(down)
    alpha = rank if stored is None else stored
    if "alpha" in keys:
        alpha = float(tensors.get_tensor(keys["alpha"]))
    product: Tensor = up @ down
    return product * (scale * alpha / rank)
