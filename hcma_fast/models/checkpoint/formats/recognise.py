"""What each part of a located model is made from, whatever format its files have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hcma_fast.models.checkpoint.configs import PartName
from hcma_fast.models.checkpoint.formats.gligen import with_gligen
from hcma_fast.models.checkpoint.formats.single_file import read_single_file, read_vae_file
from hcma_fast.models.checkpoint.located import Checkpoint
from hcma_fast.models.checkpoint.options import GLIGEN_FILE, MODEL_FILE, VAE_FILE
from hcma_fast.models.checkpoint.parts import PART_CLASSES, PartPlan, folder_plan


@dataclass(frozen=True)
class Recognised:
    """The parts' plans, and what to say of the files."""

    format: str
    """of the model, in words"""
    plans: dict[PartName, PartPlan]
    named: frozenset[PartName]
    """parts from files in which every tensor must have its use"""
    unknown: tuple[str, ...]
    """keys of a single file that no part takes"""
    ignored: int
    """its tensors of training, which do no harm"""


def recognise(checkpoint: Checkpoint, folder: Path) -> Recognised:
    """Plans of all parts.

    Args:
        folder: with the checkpoint's files as they were opened, see :meth:`Checkpoint.opened`.

    Raises:
        WeightsError: a file is damaged, of another model, or lacks a part.
    """
    sources = checkpoint.sources
    if MODEL_FILE in sources:
        optional: list[PartName] = ["vae"] if VAE_FILE in sources else []
        single = read_single_file(folder / MODEL_FILE, optional=optional)
        plans, name = dict(single.plans), single.format
        unknown, ignored = single.unknown, single.ignored
        named: set[PartName] = set(plans)
    else:
        plans = {
            part: folder_plan(cls, folder / part)
            for part, cls in PART_CLASSES.items()
            if not (part == "vae" and VAE_FILE in sources)
        }
        name, unknown, ignored, named = "folder in diffusers' layout", (), 0, set()
    if GLIGEN_FILE in sources:
        plans["unet"] = with_gligen(plans["unet"], folder / GLIGEN_FILE)
        named.add("unet")
    if VAE_FILE in sources:
        plans["vae"] = read_vae_file(folder / VAE_FILE)
        named.add("vae")
    return Recognised(name, plans, frozenset(named), tuple(unknown), ignored)
