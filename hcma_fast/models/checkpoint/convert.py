"""Write a model of any format as a folder of ours, which diffusers' own pipelines load too."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import PNDMScheduler

from hcma_fast.errors import OutputError
from hcma_fast.files import new_folder
from hcma_fast.models.checkpoint.folder import load_components, rename
from hcma_fast.models.checkpoint.formats.recognise import recognise
from hcma_fast.models.checkpoint.formats.single_file import is_harmless, refuse_unknown
from hcma_fast.models.checkpoint.info import INDEX_FILE, CheckpointInfo, Origin, write_info
from hcma_fast.models.checkpoint.located import Checkpoint
from hcma_fast.models.checkpoint.options import MODEL_FILE
from hcma_fast.models.checkpoint.parts import PART_CLASSES, check_part
from hcma_fast.schedule import BETA_END, BETA_START, STEPS_OFFSET, TRAIN_STEPS

StoredDtype = Literal["float32", "float16", "bfloat16"]
HASHES_FILE = "sha256.txt"


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What was recognised of a model: its format, and its parts with their parameters.

    Raises:
        WeightsError: it cannot be loaded; no weight is read for it.
    """
    with checkpoint.opened() as (folder, _):
        found = recognise(checkpoint, folder)
        parameters, unknown, unused_of = {}, list(found.unknown), 0
        for part, cls in PART_CLASSES.items():
            parameters[part], unused = check_part(cls, found.plans[part], folder / part)
            if part in found.named:
                unknown += [key for key in unused if not is_harmless(key)]
            unused_of += len(unused)
        refuse_unknown(unknown, checkpoint.folder)
    unet = found.plans["unet"].config
    return {
        "source": str(checkpoint.folder),
        "format": found.format,
        "parameters": parameters,
        "grounding": unet.get("attention_type") == "gated",
        "aligner": str(checkpoint.aligner_folder) if checkpoint.aligner_folder else None,
        "ignored_tensors": found.ignored + unused_of,
        "loras": [f"{one.path}:{one.scale}" for one in checkpoint.options.loras],
    }


def convert(
    checkpoint: Checkpoint, name: str, out: Path, dtype: StoredDtype = "float32"
) -> CheckpointInfo:
    """Write the model to the new folder ``out``; returns what its hcma.json says.

    Args:
        name: what the user calls the model: a hub id, or a path, of which the last part is kept.

    Raises:
        WeightsError: it cannot be loaded.
        OutputError: ``out`` holds something, or cannot be written.
    """
    check_empty(out)
    with checkpoint.opened() as (folder, _):
        form = recognise(checkpoint, folder).format
    parts = load_components(checkpoint)
    hub = not Path(name).exists()
    source = name if hub else Path(name).resolve().name
    origin = Origin(
        source=source,
        format=form,
        files={
            (source if key == MODEL_FILE else key): file.sha256
            for key, file in checkpoint.files.items()
        },
        loras=tuple(f"{Path(one.path).name}:{one.scale}" for one in checkpoint.options.loras),
        dtype=dtype,
        hcma_fast=metadata.version("hcma-fast"),
    )
    stored = getattr(torch, dtype)
    with new_folder(out) as partial:
        for part, model in (
            ("unet", parts.unet),
            ("vae", parts.vae),
            ("text_encoder", parts.text_encoder),
        ):
            rename(model, source)
            model.to(stored).save_pretrained(partial / part)
        parts.tokenizer.save_pretrained(partial / "tokenizer")
        if parts.aligner is not None:
            parts.aligner.save_pretrained(partial / "aligner", stored)
        # the settings as they were: an aligner may come later
        info = parts.info.model_copy(update={"origin": origin, "alignment": parts.settings})
        write_info(partial, info)
        _write_for_diffusers(partial, gated=parts.gated)
        _write_hashes(partial)
    return info


def _write_for_diffusers(folder: Path, *, gated: bool) -> None:
    """What its pipelines need beside the parts: their own class and a scheduler."""
    scheduler = PNDMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=STEPS_OFFSET,
    )
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": f"StableDiffusion{'GLIGEN' * gated}Pipeline",
        "_diffusers_version": metadata.version("diffusers"),
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def check_empty(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        OutputError: it does, or it is a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            "there is something in this place already",
            value=str(out),
            remedy="Give another --out, or move it away.",
        )


def _write_hashes(folder: Path) -> None:
    """sha256.txt, in the format of sha256sum."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    (folder / HASHES_FILE).write_text("".join(lines))
