"""Training states: written whole or not at all, and read without running code."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hcma_fast.errors import WeightsError
from hcma_fast.files import write_whole
from hcma_fast.models.checkpoint.json_files import first_line


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module,
    step: int,
    settings: Mapping[str, float],
) -> None:
    """Write model, optimiser, average, step and settings to ``path``, whole or not at all."""
    content = {
        "settings": dict(settings),
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
    }
    write_state(path, content)


def write_state(path: Path, content: dict[str, object]) -> None:
    """``torch.save`` to ``path``, whole or not at all.

    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    # in memory first: torch's own writer hides the system's error
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """``tensors`` as safetensors to ``path``, whole or not at all.

    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    write_whole(path, lambda file: file.write(content))


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module
) -> int:
    """Restore what :func:`save_state` wrote; returns the step to go on from (0 without a file).

    Raises:
        WeightsError: the file is damaged or belongs to a model of another shape.
    """
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step = int(state["step"])
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise _unusable(path, first_line(error)) from error
    return step


def check_begun(path: Path, settings: Mapping[str, float]) -> None:
    """Was the run whose state :func:`save_state` wrote to ``path``, if any, begun with these?

    Raises:
        WeightsError: it was not, or the file is damaged, or does not say.
    """
    if not path.exists():
        return
    try:
        # mapped: of the weights nothing is read
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = stored.get("settings")
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise _unusable(path, first_line(error)) from error
    if not isinstance(found, dict):
        raise _unusable(path, "it does not say with which settings it was begun")
    check_settings(path, found, settings)


def _unusable(path: Path, why: str) -> WeightsError:
    return WeightsError(
        f"this training state cannot be resumed ({why})",
        value=str(path),
        remedy="Delete it to start over, or give the run another folder.",
    )


def check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Is a run in ``path`` to go on as it was begun?

    Raises:
        WeightsError: a setting differs; the message names it.
    """
    for name in sorted(wanted.keys() | found.keys()):
        was, now = found.get(name), wanted.get(name)
        if was != now:
            raise WeightsError(
                f"this run was begun with {name} = {was}, not {now}",
                value=str(path),
                remedy="Give what it was begun with, or another --out.",
            )
