"""What stage 2 exports: the whole model as a checkpoint folder, with the UNet that was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from safetensors.torch import save

from hcma_fast.errors import OutputError, WeightsError
from hcma_fast.files import PARTIAL_NAME, new_folder, write_whole
from hcma_fast.models.checkpoint.folder import Checkpoint
from hcma_fast.models.checkpoint.info import (
    INFO_FILE,
    PARTS,
    READ_SUFFIXES,
    CheckpointInfo,
    read_info,
    write_info,
)
from hcma_fast.train.loop.run_folder import PROVENANCE_FILE, Provenance, read_provenance

_WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


class CheckpointWriter:
    """Writes checkpoint folders that differ from ``source`` in the UNet's weights and in ``info``.

    All other parts are copies of their files. The folder of an earlier export of the same run gets
    new weights alone, by one rename, so that it can be loaded at any time.
    """

    def __init__(self, source: Checkpoint, info: CheckpointInfo, provenance: Provenance) -> None:
        self.source, self.info, self.provenance = source, info, provenance

    def check(self, folder: Path) -> None:
        """Refuse a folder that another run, or nobody's run, has filled.

        Raises:
            OutputError: it is one.
        """
        if folder.exists() and not self._is_ours(folder):
            raise OutputError(
                "this folder is not of this run, and would be overwritten",
                value=str(folder),
                remedy="Give another --out, or move the folder away.",
            )

    def __call__(self, folder: Path, unet: UNet2DConditionModel) -> None:
        """Write ``folder``.

        Raises:
            OutputError: it cannot be written, or the disk is full.
        """
        # what a killed process left, which can be as large as the model
        for stale in folder.parent.glob(".*.part"):
            match = PARTIAL_NAME.fullmatch(stale.name)
            if match and match["name"] == folder.name and _is_half_export(stale):
                shutil.rmtree(stale, ignore_errors=True)
        if self._is_ours(folder):
            for half in folder.rglob(".*.part"):
                if PARTIAL_NAME.fullmatch(half.name) and half.is_file():
                    half.unlink()
            _write_weights(folder, unet)
            return
        with new_folder(folder) as partial:
            for part in PARTS:
                _copy(self.source.folder / part, partial / part, weights=part != "unet")
            if self.source.aligner_folder is not None:
                _copy(self.source.aligner_folder, partial / "aligner")
            _write_weights(partial, unet)
            write_info(partial, self.info)
            # from the start: without it the folder would be a stranger's to the next run
            (partial / PROVENANCE_FILE).write_text(self.provenance.model_dump_json(indent=2) + "\n")

    def _is_ours(self, folder: Path) -> bool:
        """Is all but the UNet's weights as this run would write it?"""
        try:
            found = read_provenance(folder / PROVENANCE_FILE)
            return (found.architecture, read_info(folder)) == (
                self.provenance.architecture,
                self.info,
            )
        except (ValidationError, WeightsError):
            return False


def _is_half_export(folder: Path) -> bool:
    """Does the folder hold nothing but what an export writes?"""
    ours = {*PARTS, "aligner", INFO_FILE, PROVENANCE_FILE}
    return folder.is_dir() and all(
        path.name in ours or PARTIAL_NAME.fullmatch(path.name) for path in folder.iterdir()
    )


def _copy(source: Path, target: Path, *, weights: bool = True) -> None:
    """Copy what loading may read; a hub's folder holds links, which are followed."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        index = path.name.endswith(".safetensors.index.json")
        if path.suffix in READ_SUFFIXES and (
            weights or not (index or path.suffix == ".safetensors")
        ):
            shutil.copyfile(path, target / path.name)


def _write_weights(folder: Path, unet: UNet2DConditionModel) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in unet.state_dict().items()}
    # as diffusers writes it; without the format, transformers and diffusers refuse the file
    content = save(state, {"format": "pt"})
    write_whole(folder / _WEIGHTS, lambda file: file.write(content))
