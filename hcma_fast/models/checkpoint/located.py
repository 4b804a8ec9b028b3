"""A model's files: found, opened and hashed, before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hcma_fast.errors import WeightsError
from hcma_fast.files import is_file
from hcma_fast.models.checkpoint.configs import foreign_error
from hcma_fast.models.checkpoint.formats.pickles import as_safetensors
from hcma_fast.models.checkpoint.info import (
    PARTS,
    check_aligner,
    check_safe,
    hash_opened,
    open_weight_file,
    open_weights,
    resolve,
)
from hcma_fast.models.checkpoint.options import DEFAULTS, MODEL_FILE, ModelOptions
from hcma_fast.opened import OpenedFile, private_folder


@dataclass(frozen=True)
class Checkpoint:
    """Where the files of a model lie; nothing is loaded yet."""

    folder: Path
    """the model's folder in diffusers' layout, or its single file"""
    aligner_folder: Path | None
    options: ModelOptions = DEFAULTS

    @property
    def sources(self) -> dict[str, Path]:
        """The files that are no folder's, by the names under which they are opened."""
        return {
            **({MODEL_FILE: self.folder} if is_file(self.folder) else {}),
            **self.options.files(),
        }

    @cached_property
    def files(self) -> dict[str, OpenedFile]:
        """The files that loading reads, opened now: what is hashed is what is loaded.

        Raises:
            WeightsError: one cannot be read.
        """
        sources = self.sources
        folder = None if MODEL_FILE in sources else self.folder
        opened = open_weights(folder, self.aligner_folder)
        for name, path in sources.items():
            opened[name] = open_weight_file(as_safetensors(path))
        return opened

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of the files' contents, the same wherever the folder lies."""
        digest, options = hash_opened(self.files), self.options
        scales = [float(lora.scale) for lora in options.loras]
        if options.clip_skip is None and not scales:
            return digest  # a model's own setting is in its hcma.json, which is hashed
        text = json.dumps([digest, options.clip_skip, *scales])
        return hashlib.sha256(text.encode()).hexdigest()

    @contextmanager
    def opened(self) -> Iterator[tuple[Path, Path | None]]:
        """Temporary folders with :attr:`files`: the parts, and the aligner if there is one."""
        start = "aligner/"
        aligner = {n.removeprefix(start): f for n, f in self.files.items() if n.startswith(start)}
        parts = {n: f for n, f in self.files.items() if not n.startswith(start)}
        with (
            private_folder(parts, origin=self.folder, origins=self.sources) as folder,
            private_folder(aligner, origin=self.aligner_folder) as aligner_folder,
        ):
            yield folder, aligner_folder if self.aligner_folder is not None else None


def locate(
    name_or_path: str | Path | Checkpoint,
    *,
    aligner: str | Path | None = None,
    options: ModelOptions | None = None,
    offline: bool = False,
    check_hash: Callable[[str], object] | None = None,
) -> Checkpoint:
    """Find a model and refuse what is incomplete or unsafe, without loading it.

    What was located before is returned as it is, so that its files are opened and hashed once.

    Args:
        check_hash: is given the weights' hash of a complete model before any file is understood.

    Other arguments and errors: see :func:`..folder.load_components`.
    """
    if isinstance(name_or_path, Checkpoint):
        return name_or_path
    folder = resolve(name_or_path, offline=offline)
    single = folder.is_file()
    missing = [] if single else [part for part in PARTS if not (folder / part).is_dir()]
    aligner_folder: Path | None = Path(aligner) if aligner is not None else folder / "aligner"
    if aligner is None and not (folder / "aligner").is_dir():
        aligner_folder = None
    checkpoint = Checkpoint(folder, aligner_folder, options or DEFAULTS)
    if aligner_folder is not None and not aligner_folder.is_dir():
        raise WeightsError(
            "there is no folder of an aligner here",
            value=str(aligner_folder),
            remedy="Give the folder of one that was trained for this model.",
        )
    if check_hash is not None and not missing:
        check_hash(checkpoint.weights_hash)
    if not single:
        check_safe(folder)
    if "unet" in missing and (folder / "transformer").is_dir():
        raise foreign_error("a model of transformers, as SD 3 and FLUX are", folder)
    if missing:
        raise WeightsError(
            f"the checkpoint lacks {', '.join(missing)}",
            value=str(folder),
            remedy=f"Give a folder in diffusers' layout, with {', '.join(PARTS)}.",
        )
    if aligner_folder is not None:
        check_aligner(aligner_folder)
    return checkpoint
