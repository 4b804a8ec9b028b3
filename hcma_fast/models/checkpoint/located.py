"""A model's files: found, opened and hashed, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.info import (
    PARTS,
    check_aligner,
    check_safe,
    hash_opened,
    open_weights,
    resolve_folder,
)
from hcma_fast.opened import OpenedFile, private_folder


@dataclass(frozen=True)
class Checkpoint:
    """Where the files of a model lie; nothing is loaded yet."""

    folder: Path
    aligner_folder: Path

    @cached_property
    def files(self) -> dict[str, OpenedFile]:
        """The files that loading reads, opened now: what is hashed is what is loaded.

        Raises:
            WeightsError: one cannot be read.
        """
        return open_weights(self.folder, self.aligner_folder)

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of the files' contents, the same wherever the folder lies."""
        return hash_opened(self.files)

    @contextmanager
    def opened(self) -> Iterator[tuple[Path, Path]]:
        """Temporary folders with :attr:`files`: the parts, and the aligner."""
        start = "aligner/"
        aligner = {n.removeprefix(start): f for n, f in self.files.items() if n.startswith(start)}
        parts = {n: f for n, f in self.files.items() if not n.startswith(start)}
        with (
            private_folder(parts, origin=self.folder) as folder,
            private_folder(aligner, origin=self.aligner_folder) as aligner_folder,
        ):
            yield folder, aligner_folder


def locate(
    name_or_path: str | Path | Checkpoint,
    *,
    aligner: str | Path | None = None,
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
    folder = resolve_folder(name_or_path, offline=offline)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    aligner_folder = Path(aligner) if aligner is not None else folder / "aligner"
    checkpoint = Checkpoint(folder, aligner_folder)
    if check_hash is not None and not missing and aligner_folder.is_dir():
        check_hash(checkpoint.weights_hash)
    check_safe(folder)
    if missing:
        raise WeightsError(
            f"the checkpoint lacks {', '.join(missing)}",
            value=str(folder),
            remedy=f"Give a folder in diffusers' layout, with {', '.join(PARTS)} and aligner.",
        )
    if not aligner_folder.is_dir():
        raise WeightsError(
            "the checkpoint has no aligner",
            value=str(aligner_folder),
            remedy="Pass the folder of one that was trained for this model as aligner=.",
        )
    check_aligner(aligner_folder)
    return checkpoint
