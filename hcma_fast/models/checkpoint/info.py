"""Checkpoint folders: find one, refuse what is unsafe, read hcma.json, hash the contents."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcma_fast.config import PRESETS, AlignmentSettings
from hcma_fast.errors import WeightsError

PARTS = ("tokenizer", "text_encoder", "unet", "vae")
"""Sub-folders of diffusers' layout that we read; others (safety_checker) are never opened."""

INFO_FILE = "hcma.json"
READ_SUFFIXES = (".json", ".txt", ".safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_LIBRARIES = {"diffusers", "transformers", None}


class CheckpointInfo(BaseModel):
    """hcma.json of a checkpoint: what the parts' own configs do not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    preset: str = "sd14"
    image_size: int = Field(512, gt=0, description="side of the square images, in pixels")
    alignment: AlignmentSettings = AlignmentSettings()


def resolve_folder(name_or_path: str | Path, *, offline: bool = False) -> Path:
    """The folder of a preset, a path, or a hub id (from the hub's cache, else downloaded).

    Raises:
        WeightsError: there is no such preset or folder, or the hub does not deliver.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name == "sd14":
        raise WeightsError(
            "the weights of sd14 do not come with the package",
            value=name,
            remedy="Give a folder in diffusers' layout, or a hub id such as "
            "masterful/gligen-1-4-generation-text-box; to build only, add --random-weights.",
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.exists():
        raise WeightsError(
            "no such preset or folder",
            value=name,
            remedy=f"Presets: {', '.join(PRESETS)}. Or give a folder, or a hub id (owner/name).",
        )
    from huggingface_hub import snapshot_download

    wanted = [f"{part}/*{suffix}" for part in (*PARTS, "aligner") for suffix in READ_SUFFIXES]
    try:
        found = snapshot_download(
            name, local_files_only=offline, allow_patterns=["model_index.json", INFO_FILE, *wanted]
        )
    except Exception as error:  # huggingface_hub raises many kinds, its HTTP client's among them
        raise WeightsError(
            f"there is no such folder, and the hub delivered no model ({type(error).__name__})",
            value=name,
            remedy="Check the name and the network (is HF_HUB_OFFLINE set?), log in with "
            "`hf auth login` if the model is gated, or download it elsewhere and give its folder.",
        ) from error
    return Path(found)


def check_safe(folder: Path) -> None:
    """Refuse what would run code: pickled weights without safetensors beside them, and remote code.

    Raises:
        WeightsError: names the file.
    """
    parts = [folder / part for part in PARTS if (folder / part).is_dir()]
    # a .ckpt beside complete parts is never opened; alone, it is what the user meant
    places = parts if len(parts) == len(PARTS) else [folder, *parts]
    for path in sorted(path for place in places for path in place.iterdir()):
        if path.suffix in _PICKLE_SUFFIXES and not any(path.parent.glob("*.safetensors")):
            raise WeightsError(
                "this checkpoint holds weights in a format that can run code when it is read",
                value=str(path),
                remedy="Convert them to safetensors: load in diffusers where you trust the file, "
                "then save_pretrained(folder).",
            )
        if path.suffix == ".json" and "auto_map" in _json_object(path):
            _refuse_code(path)
    index = folder / "model_index.json"
    for part, value in _json_object(index).items() if index.is_file() else ():
        if part in PARTS and isinstance(value, list) and {*value[:1]} - _LIBRARIES:
            _refuse_code(index)


def _refuse_code(path: Path) -> None:
    raise WeightsError(
        "this checkpoint asks to run code of its own",
        value=str(path),
        remedy="Use a checkpoint of the libraries' own classes; remote code is never run.",
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"this file of the checkpoint is not JSON ({error})",
            value=str(path),
            remedy="It is damaged: download or build the checkpoint again.",
        ) from error
    return data if isinstance(data, dict) else {}


def hash_weights(folder: Path, aligner_folder: Path) -> str:
    """sha256 over names and contents of every file that loading may read, wherever it lies."""
    files = {f"{part}/{path.name}": path for part in PARTS for path in (folder / part).iterdir()}
    files |= {f"aligner/{path.name}": path for path in aligner_folder.iterdir()}
    files[INFO_FILE] = folder / INFO_FILE
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        if path.suffix in READ_SUFFIXES and path.is_file():
            with path.open("rb") as file:
                digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_info(folder: Path) -> CheckpointInfo | None:
    """hcma.json, or None when the checkpoint has none (a plain GLIGEN folder).

    Raises:
        WeightsError: it is there, but not valid.
    """
    path = folder / INFO_FILE
    if not path.exists():
        return None
    try:
        return CheckpointInfo.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise WeightsError(
            f"hcma.json is not valid: {first_line(error)}",
            value=str(path),
            remedy="Build the checkpoint again, or delete the file to use the paper's settings.",
        ) from error


def write_info(folder: Path, info: CheckpointInfo) -> None:
    """Write hcma.json, whole or not at all."""
    partial = folder / f".{INFO_FILE}.part"
    with partial.open("w") as file:
        file.write(json.dumps(info.model_dump(), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / INFO_FILE)


def first_line(error: Exception) -> str:
    """One line that says what ``error`` is: libraries' messages run over pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
