"""The folder of a run of a stage: states to resume from, exports, logs.

Of a stage named NAME, ``NAME/`` holds the best export by the val part, ``NAME-last/`` the last one,
each with training.json, which says where it comes from. ``NAME-run/`` holds states, log.jsonl,
TensorBoard's events and, where they are asked for, samples. Stage 1 is ``aligner`` and exports what
``--aligner`` and ``Aligner.from_pretrained`` take, stage 2 is ``denoiser`` and exports what
``--model`` and ``HCMAPipeline.from_pretrained`` take.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from hcma_fast.errors import OutputError, UsageError, WeightsError
from hcma_fast.files import PARTIAL_NAME, append_line, make_folder, read_file, write_whole
from hcma_fast.models.checkpoint.json_files import first_line
from hcma_fast.train.data.latent_cache import CacheHeader
from hcma_fast.train.loop.states import check_settings, write_state

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from hcma_fast.train.loop.samples import SamplePlan

PROVENANCE_FILE = "training.json"
LOG_FILE = "log.jsonl"
_STATE = re.compile(r"step-\d{8,}\.pt")


class Provenance(BaseModel):
    """Where an export comes from; a run goes on only with what it was begun with."""

    model_config = ConfigDict(frozen=True)

    cache: str
    """digest of the cache's header"""
    vae_sha256: str
    text_sha256: str
    architecture: dict[str, Any]
    training: dict[str, Any]
    """settings that change the weights"""


@dataclass
class RunState:
    """How far a run is. Order, noise and learning rate follow from ``step``."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None


def read_provenance(path: Path) -> Provenance:
    """What a training.json says; it also holds the step and its figures.

    Raises:
        WeightsError: it cannot be read.
        ValidationError: it is no such file.
    """
    return Provenance.model_validate_json(read_file(path, "training.json", kind=WeightsError))


def check_provenance(folder: Path, header: CacheHeader) -> None:
    """Was the aligner in ``folder`` trained with the encoders of this cache? Unknown is no error.

    Raises:
        WeightsError: it was not, or its training.json is damaged.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return
    try:
        found = read_provenance(path)
    except (WeightsError, ValidationError) as error:
        raise WeightsError(
            f"this file is damaged: {first_line(error)}",
            value=str(path),
            remedy="Delete it where you know that the aligner fits the cache.",
        ) from error
    for name in ("vae_sha256", "text_sha256"):
        if getattr(found, name) != getattr(header, name):
            raise WeightsError(
                f"this aligner was trained with another encoder than the cache was made with: the "
                f"{name} differ",
                value=str(folder),
                remedy="Make the cache with the model that the aligner belongs to.",
            )


class RunFolder:
    """Reads and writes the folder of a run; only the main process writes.

    Args:
        name: of the stage.
    """

    def __init__(
        self, out: Path, name: str, provenance: Provenance, *, main: bool, keep: int
    ) -> None:
        self.best_folder, self.last_folder = out / name, out / f"{name}-last"
        self.work = out / f"{name}-run"
        self.states = self.work / "states"
        self.provenance, self.main, self.keep = provenance, main, keep
        self._events: SummaryWriter | None = None
        if main:
            make_folder(self.states)

    def newest(self) -> Path | None:
        """The newest state; files are renamed when whole, so every one of them is."""
        found = self._state_files()
        return found[-1] if found else None

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
    ) -> RunState:
        """Restore the newest state, or start at 0.

        Args:
            average: of the weights, where the settings ask for one.

        Raises:
            WeightsError: it is damaged, or of a run with another cache, architecture or settings.
        """
        path = self.newest()
        if path is None:
            return RunState()
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            there = Provenance.model_validate(stored["provenance"])
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise _unusable(path, first_line(error)) from error
        self._check_same(path, there)
        try:
            model.load_state_dict(stored["model"])
            optimizer.load_state_dict(stored["optimizer"])
            if average is not None:
                average.load_state_dict(stored["average"])
            state = RunState(**stored["state"])
        except Exception as error:  # as above
            raise _unusable(path, first_line(error)) from error
        return state

    def _check_same(self, path: Path, there: Provenance) -> None:
        wanted, found = self.provenance.model_dump(), there.model_dump()
        check_settings(path, found["architecture"], wanted["architecture"])
        # a constant rate leads the same way, however long
        free = () if wanted["training"]["cosine"] else ("epochs", "max_steps")
        kept = (
            {name: value for name, value in settings.items() if name not in free}
            for settings in (found["training"], wanted["training"])
        )
        check_settings(path, *kept)
        for name in ("vae_sha256", "text_sha256", "cache"):
            if wanted[name] != found[name]:
                raise WeightsError(
                    "this run was begun with another cache",
                    value=str(path),
                    remedy="Give the cache that it was begun with, or another --out.",
                )

    def save(
        self,
        state: RunState,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
    ) -> None:
        """Write a state, and remove all but the newest ``keep``."""
        if not self.main:
            return
        content: dict[str, object] = {
            "provenance": self.provenance.model_dump(),
            "state": vars(state),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": None if average is None else average.state_dict(),
        }
        write_state(self.states / f"step-{state.step:08d}.pt", content)
        for old in self._state_files()[: -self.keep]:
            old.unlink(missing_ok=True)

    def _state_files(self) -> list[Path]:
        """Of this run, the oldest first; a user's copies have other names."""
        paths = self.states.glob("step-*.pt")
        return sorted(path for path in paths if _STATE.fullmatch(path.name))

    def export(
        self, folder: Path, write: Callable[[Path], None], step: int, figures: dict[str, Any]
    ) -> None:
        """Have an export written to ``folder``, and training.json with it.

        Raises:
            OutputError: it cannot be written, or the disk is full.
        """
        if not self.main:
            return
        try:
            write(folder)
        except OSError as error:
            raise OutputError.from_os(error, folder) from error
        record = self.provenance.model_dump() | {"step": step, "val": figures}
        content = json.dumps(record, indent=2) + "\n"
        write_whole(folder / PROVENANCE_FILE, lambda file: file.write(content.encode()))

    @contextmanager
    def logging(self, step: int, *, tensorboard: bool) -> Iterator[None]:
        """Open the logs, cut back to ``step``: a run that was killed repeats what came after.

        What it left half written goes.

        Raises:
            UsageError: TensorBoard is not installed.
            OutputError: the folder cannot be written.
        """
        if not self.main:
            yield
            return
        self._remove_halves()
        path = self.work / LOG_FILE
        if path.exists():
            lines = path.read_bytes().splitlines()
            # the last can be whole but for its end, to which the next record would be glued
            kept = b"".join(line + b"\n" for line in lines if _step_of(line) <= step)
            write_whole(path, lambda file: file.write(kept))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UsageError(
                    "tensorboard is not installed",
                    remedy="pip install 'hcma-fast[train]', or give --no-tensorboard.",
                ) from error
            self._events = SummaryWriter(self.work / "tensorboard", purge_step=step + 1)
        try:
            yield
        finally:
            if self._events is not None:
                self._events.close()
                self._events = None

    def _remove_halves(self) -> None:
        """Remove what a killed process was writing: a state is larger than its model."""
        for half in self.work.rglob(".*.part"):
            if not PARTIAL_NAME.fullmatch(half.name) or not half.is_file():
                continue
            try:
                half.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError.from_os(error, half) from error

    def draw(self, samples: SamplePlan, step: int, parts: Mapping[str, Any]) -> None:
        """Write a sheet of samples to ``NAME-run/samples/``, and to TensorBoard.

        Args:
            parts: what was trained, by its name in :meth:`SamplePlan.draw`.
        """
        if self.main:
            samples.draw(self.work / "samples", step, events=self._events, **parts)

    def log(self, part: str, record: dict[str, Any]) -> None:
        """Append a record to log.jsonl, and its numbers to TensorBoard."""
        if not self.main:
            return
        path = self.work / LOG_FILE
        append_line(path, json.dumps({"part": part, **record}))
        if self._events is None:
            return
        for name, value in record.items():
            values = value if isinstance(value, list) else [value]
            for bucket, number in enumerate(values):
                if number is not None:
                    tag = f"{part}/{name}" + (f"/{bucket}" if isinstance(value, list) else "")
                    self._events.add_scalar(tag, number, record["step"])


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # half a line, of a process that was killed
        return float("inf")


def _unusable(path: Path, why: str) -> WeightsError:
    return WeightsError(
        f"this training state cannot be resumed ({why})",
        value=str(path),
        remedy="Delete it to go on from the one before, or give another --out.",
    )
