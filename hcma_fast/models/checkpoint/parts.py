"""Load one part of a checkpoint; the libraries get values and tensors, never a path to read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_logging

from hcma_fast.models.checkpoint.configs import PartName, read_config, refused_value
from hcma_fast.models.checkpoint.json_files import tell_once
from hcma_fast.models.checkpoint.weight_files import (
    WeightFile,
    damage,
    read_weights,
    weight_files,
)

PART_CLASSES: dict[PartName, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
}
_PARTS = {cls: part for part, cls in PART_CLASSES.items()}


@dataclass(frozen=True)
class PartPlan:
    """What a part is made from: its config, and the files that hold its weights."""

    config: Mapping[str, Any]
    weights: tuple[WeightFile, ...]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports of transformers: what matters becomes a WeightsError."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_part(cls: Any, folder: Path) -> Any:
    """One part in float32; refuses what the libraries only warn of, above all missing weights.

    Args:
        cls: its class in diffusers or transformers; folder: of this part.

    Raises:
        WeightsError: it is missing, damaged, lacks weights, or asks for what we do not do.
    """
    model, unused = make_part(cls, folder_plan(cls, folder), folder)
    tell_unused(folder.name, unused)
    return model


def tell_unused(part: str, unused: Sequence[str]) -> None:
    """Say once what weights of a part's folder the part does not have."""
    if unused:
        tell_once(f"note: {len(unused)} weights of {part} are unused, {min(unused)!r} first")


def folder_plan(cls: Any, folder: Path) -> PartPlan:
    """The plan of a part in diffusers' layout.

    Raises:
        WeightsError: see :func:`load_part`.
    """
    path = folder / "config.json"
    values = read_config(_PARTS[cls], path)
    _check_types(CLIPTextConfig if cls is CLIPTextModel else cls, path, values)
    return PartPlan(values, tuple(WeightFile(path) for path in weight_files(folder)))


def make_part(cls: Any, plan: PartPlan, folder: Path) -> tuple[Any, list[str]]:
    """A part by its plan, and the keys of its weights that it does not have.

    Args:
        folder: of the part, named as it is, for errors.

    Raises:
        WeightsError: see :func:`load_part`.
    """
    with damage(folder.name, folder), quiet_transformers():
        model, config, shapes = _without_weights(cls, plan)
        weights, unused = read_weights(folder.name, plan.weights, shapes)
        if config is not None:
            # transformers fills the buffers that are not saved
            model = cls.from_pretrained(
                None, config=config, state_dict=weights, dtype=torch.float32, local_files_only=True
            )
        else:
            model.load_state_dict(weights, assign=True)
    return model.eval(), unused


def check_part(cls: Any, plan: PartPlan, folder: Path) -> tuple[int, list[str]]:
    """Parameters of a part, and the keys that it does not have; no weight is read.

    Raises:
        WeightsError: see :func:`make_part`.
    """
    with damage(folder.name, folder), quiet_transformers():
        _, _, shapes = _without_weights(cls, plan)
        _, unused = read_weights(folder.name, plan.weights, shapes, values=False)
    return sum(math.prod(shape) for shape in shapes.values()), unused


def _without_weights(cls: Any, plan: PartPlan) -> tuple[Any, Any, dict[str, tuple[int, ...]]]:
    """The model on the meta device, its config if it is of transformers, and its shapes."""
    values = dict(plan.config)
    config = CLIPTextConfig(**values) if cls is CLIPTextModel else None
    # on the meta device: a shape that no file has costs no memory
    with torch.device("meta"):
        model = cls(config) if config is not None else cls(**values)
    return model, config, {name: tuple(v.shape) for name, v in model.state_dict().items()}


def _check_types(cls: type, path: Path, values: dict[str, Any]) -> None:
    """Refuse values of other types than the class's defaults: they would fail at the first call."""
    for name, parameter in inspect.signature(cls).parameters.items():
        default = parameter.default
        if name not in values or default is None or default is parameter.empty:
            continue
        value = values[name]
        entries = value if isinstance(value, list) else [value]
        if isinstance(default, tuple):
            kind: type | tuple[type, ...] = type(default[0])
        else:
            kind = (int, float) if isinstance(default, float) else type(default)
        wrong = [entry for entry in entries if not _is(entry, kind)]
        if wrong and value is not None:
            raise refused_value(path, f"{name} has a value of a wrong type", wrong[0])


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (list, *(kind if isinstance(kind, tuple) else (kind,))))
