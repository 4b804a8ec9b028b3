"""Load one part of a checkpoint; the libraries get values and tensors, never a path to read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_logging

from hcma_fast.models.checkpoint.configs import PartName, read_config, refused_value
from hcma_fast.models.checkpoint.json_files import tell_once
from hcma_fast.models.checkpoint.weight_files import damage, read_weights, weight_files

_PARTS: dict[type, PartName] = {
    UNet2DConditionModel: "unet",
    AutoencoderKL: "vae",
    CLIPTextModel: "text_encoder",
}


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
    path = folder / "config.json"
    values = read_config(_PARTS[cls], path)
    text = cls is CLIPTextModel
    _check_types(CLIPTextConfig if text else cls, path, values)
    files = weight_files(folder)
    with damage(folder.name, folder), quiet_transformers():
        config = CLIPTextConfig(**values) if text else None
        # on the meta device: a shape that no file has costs no memory
        with torch.device("meta"):
            model = cls(config) if text else cls(**values)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        weights, unused = read_weights(folder.name, files, shapes)
        if text:
            # transformers fills the buffers that are not saved
            model = cls.from_pretrained(
                None, config=config, state_dict=weights, dtype=torch.float32, local_files_only=True
            )
        else:
            model.load_state_dict(weights, assign=True)
    if unused:
        tell_once(
            f"note: {len(unused)} weights of {folder.name} are unused, {sorted(unused)[0]!r} first"
        )
    return model.eval()


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
