"""Checkpoint folders: find one, refuse what is unsafe, read hcma.json, hash the contents."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcma_fast.config import PRESETS, AlignmentSettings
from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.configs import (
    OTHER_CONFIGS,
    PART_KINDS,
    TOKENIZER_CLASSES,
    PartName,
    check_class,
    check_keys,
    read_config,
    refused_code,
)
from hcma_fast.models.checkpoint.formats.pickles import as_safetensors
from hcma_fast.models.checkpoint.hub import download, is_hub_id
from hcma_fast.models.checkpoint.json_files import (
    VOCABULARY_BYTES,
    files_in,
    first_line,
    open_file,
    read_json,
    read_object,
    shorten,
    tell_once,
)
from hcma_fast.models.checkpoint.scheduler import SCHEDULER_FILE, check_scheduler
from hcma_fast.models.checkpoint.weight_files import choose_files
from hcma_fast.opened import OpenedFile

PARTS = ("tokenizer", "text_encoder", "unet", "vae")
"""Sub-folders of diffusers' layout that we read; others (safety_checker) are never opened."""

INFO_FILE = "hcma.json"
READ_SUFFIXES = (".json", ".txt", ".safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
INDEX_FILE = "model_index.json"
PICKLES = "*.bin"
_WEIGHT_PARTS = get_args(PartName)
_CLASSES: dict[str, tuple[str, ...]] = {
    **{str(part): kind.classes for part, kind in PART_KINDS.items()},
    "tokenizer": TOKENIZER_CLASSES,
}
_KNOWN_ENTRIES = {
    *(*PARTS, "aligner", "scheduler", INDEX_FILE, INFO_FILE),
    # parts of diffusers' pipelines that nearly every folder has
    *("safety_checker", "feature_extractor"),
}
_DOCUMENTS = re.compile(r".*\.(md|txt|png|jpe?g)|LICENSE|NOTICE")
_PART_FILES = {
    *("config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *OTHER_CONFIGS,
}
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)[.-].*(safetensors|json)")
_SHOWN_UNUSED = 5


class Origin(BaseModel):
    """Where a converted checkpoint came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="hub id, or name of the file or folder")
    format: str
    files: dict[str, str] = Field(description="sha256 of each file that was read, by its name")
    loras: tuple[str, ...] = Field((), description="file names and scales of what was folded in")
    dtype: str
    hcma_fast: str = Field(description="version that converted it")


class CheckpointInfo(BaseModel):
    """hcma.json of a checkpoint: what the parts' own configs do not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    preset: str = "sd14"
    image_size: int = Field(512, gt=0, le=2**16, description="side of the square images, in pixels")
    alignment: AlignmentSettings = AlignmentSettings()
    clip_skip: int = Field(
        1, ge=1, le=12, description="the caption is read that many layers before the encoder's end"
    )
    origin: Origin | None = None


def resolve_folder(name_or_path: str | Path, *, offline: bool = False) -> Path:
    """The folder of a preset, a path, or a hub id (from the hub's cache, else downloaded).

    Raises:
        WeightsError: there is no such preset or folder, or the hub does not deliver.
    """
    found = resolve(name_or_path, offline=offline)
    if not found.is_dir():
        raise WeightsError(
            "this needs a model's folder, and not a single file",
            value=str(found),
            remedy="Write one with hcma-fast convert FILE --out FOLDER, and give that.",
        )
    return found


def resolve(name_or_path: str | Path, *, offline: bool = False) -> Path:
    """:func:`resolve_folder`, or the single file that was named.

    Raises:
        WeightsError: there is no such preset, folder or file, or the hub does not deliver.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name]
    try:
        path = Path(name).expanduser()
        if path.is_dir() or path.is_file():
            return path
        known = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, or of no known user
        known = False
    if name == "sd14":
        raise WeightsError(
            "the weights of sd14 do not come with the package",
            value=name,
            remedy="Give a folder in diffusers' layout, a single file, or a hub id such as "
            "masterful/gligen-1-4-generation-text-box; to build only, add --random-weights.",
        )
    if known or not is_hub_id(name):
        raise WeightsError(
            "no such preset, folder or file",
            value=name,
            remedy=f"Presets: {', '.join(PRESETS)}. Or give a folder, a file, or a hub id "
            "(owner/name).",
        )
    patterns = [f"{part}/*{suffix}" for part in (*PARTS, "aligner") for suffix in READ_SUFFIXES]
    found = download(name, [INDEX_FILE, INFO_FILE, SCHEDULER_FILE, *patterns], offline=offline)
    pickled = [part for part in _WEIGHT_PARTS if not has_weights(found / part)]
    if pickled:
        # older repositories have pickles only, which are converted
        found = download(name, [f"{part}/{PICKLES}" for part in pickled], offline=offline)
    return found


def has_weights(folder: Path) -> bool:
    """Does a part's folder hold safetensors?"""
    return any(folder.glob("*.safetensors"))


def check_safe(folder: Path) -> None:
    """Refuse a model folder that would run code, or that was trained for another noise schedule.

    What lies in it and is not used is told once.

    Raises:
        WeightsError: names the file, and the key or class.
    """
    parts = [folder / part for part in PARTS if (folder / part).is_dir()]
    complete = len(parts) == len(PARTS)
    for place in parts if complete else [folder, *parts]:
        _check_files(place)
    _check_index(folder / INDEX_FILE)
    check_scheduler(folder)
    if complete:
        _tell_unused(folder)


def check_parts(folder: Path) -> None:
    """Refuse parts that would run code; :func:`check_safe` looks at the rest of the folder too.

    Raises:
        WeightsError: names the file, and the key or class.
    """
    for part in PARTS:
        _check_files(folder / part)


def check_aligner(folder: Path) -> None:
    """Refuse an aligner's folder that would run code.

    Raises:
        WeightsError: names the file.
    """
    _check_files(folder)


def _check_files(folder: Path) -> None:
    """Pickles without safetensors beside them, and the JSON files and weights that are no such."""
    files = files_in(folder)
    tensors = any(path.suffix == ".safetensors" for path in files)
    for path in files:
        convertible = path.suffix == ".bin" and folder.name in _WEIGHT_PARTS
        if path.suffix in _PICKLE_SUFFIXES and not tensors and not convertible:
            raise WeightsError(
                "this checkpoint holds weights in a format that can run code when it is read",
                value=str(path),
                remedy="Convert them to safetensors: hcma-fast convert takes .ckpt, .pth and .bin "
                "files.",
            )
        if path.suffix == ".json" and folder.name in PARTS:
            known = path.name in OTHER_CONFIGS
            data = read_json(path, VOCABULARY_BYTES)
            if known and isinstance(data, dict):
                check_keys(path, data, OTHER_CONFIGS[path.name])
        elif path.suffix in READ_SUFFIXES:
            open_file(path).close()
    if folder.name in get_args(PartName) and (folder / "config.json").exists():
        read_config(cast(PartName, folder.name), folder / "config.json")


def _check_index(path: Path) -> None:
    """model_index.json names the class of each part; a class of another library is code."""
    if not path.exists() and not path.is_symlink():
        return
    for key, value in read_object(path).items():
        if key not in _CLASSES:
            # a part that is not loaded, or a value that describes the pipeline
            if key.startswith("_") or isinstance(value, list | bool | None):
                continue
            raise refused_code(path, f"the key {shorten(key)!r}")
        library, name = value if isinstance(value, list) and len(value) == 2 else ("?", value)
        if library not in ("diffusers", "transformers", None):
            raise refused_code(path, f"the library {shorten(library)} of {key}")
        check_class(path, key, name, _CLASSES[key])


def _tell_unused(folder: Path) -> None:
    """Say what a user may take for a part of the model: a LoRA file, weights of another format."""
    extra = [
        path.name
        for path in files_in(folder)
        if path.name not in _KNOWN_ENTRIES and not _DOCUMENTS.fullmatch(path.name)
    ]
    for part in PARTS:
        extra += [
            f"{part}/{path.name}"
            for path in files_in(folder / part)
            if path.name not in _PART_FILES
            and path.suffix not in _PICKLE_SUFFIXES
            and not _DOCUMENTS.fullmatch(path.name)
            and not _WEIGHTS.fullmatch(path.name)
        ]
    if extra:
        shown = ", ".join(extra[:_SHOWN_UNUSED]) + (", ..." if len(extra) > _SHOWN_UNUSED else "")
        tell_once(f"note: not used of the model {folder}: {shown}")


def open_weights(folder: Path | None, aligner_folder: Path | None) -> dict[str, OpenedFile]:
    """Every file of these folders that loading may read, opened: by part and name.

    Of a part that has pickles alone, what they were converted to.

    Raises:
        WeightsError: one cannot be read.
    """
    files: dict[str, Path] = {}
    if folder is not None:
        for part in PARTS:
            files |= {f"{part}/{path.name}": path for path in files_in(folder / part)}
        files[INFO_FILE] = folder / INFO_FILE
    if aligner_folder is not None:
        files |= {f"aligner/{path.name}": path for path in files_in(aligner_folder)}
    opened = {
        name: open_weight_file(path)
        for name, path in sorted(files.items())
        if path.suffix in READ_SUFFIXES and os.path.lexists(path)
    }
    for part in _WEIGHT_PARTS if folder is not None else ():
        for name, path in _pickles(folder / part).items():
            opened[f"{part}/{name}"] = open_weight_file(as_safetensors(path))
    return opened


def _pickles(folder: Path) -> dict[str, Path]:
    """The pickles to convert of a part that has no other weights, by what they are to be called."""
    if has_weights(folder):
        return {}
    names = {
        path.with_suffix(".safetensors").name.removeprefix("pytorch_"): path
        for path in files_in(folder)
        if path.suffix == ".bin"
    }
    return {name: names[name] for name in choose_files(folder, names)} if names else {}


def open_weight_file(path: Path) -> OpenedFile:
    """A file of a checkpoint.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        return OpenedFile(path)
    except OSError as error:
        raise WeightsError(
            f"this file of the checkpoint cannot be read ({error.strerror})",
            value=str(path),
            remedy="Check its permissions, or get the checkpoint again.",
        ) from error


def hash_opened(files: Mapping[str, OpenedFile]) -> str:
    """sha256 over names and contents of what :func:`open_weights` opened."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(name.encode() + b"\0" + bytes.fromhex(file.sha256))
    return digest.hexdigest()


def hash_weights(folder: Path, aligner_folder: Path | None) -> str:
    """sha256 over names and contents of every file that loading may read, wherever it lies.

    Raises:
        WeightsError: one cannot be read.
    """
    return hash_opened(open_weights(folder, aligner_folder))


def read_info(folder: Path) -> CheckpointInfo | None:
    """hcma.json, or None when the checkpoint has none (a plain GLIGEN folder).

    Raises:
        WeightsError: it is there, but not valid.
    """
    path = folder / INFO_FILE
    if not path.exists() and not path.is_symlink():
        return None
    try:
        return CheckpointInfo.model_validate(read_object(path))
    except ValidationError as error:
        raise WeightsError(
            f"hcma.json is not valid: {first_line(error)}",
            value=str(path),
            remedy="Build the checkpoint again, or delete the file to use the paper's settings.",
        ) from error


def write_info(folder: Path, info: CheckpointInfo) -> None:
    """Write hcma.json, whole or not at all."""
    partial = folder / f".{INFO_FILE}.part"
    with partial.open("w") as file:
        file.write(json.dumps(info.model_dump(exclude_none=True), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / INFO_FILE)
