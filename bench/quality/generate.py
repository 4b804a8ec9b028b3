"""Generate an evaluation's images, block by block: resumable, in shards, killed at any time."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.methods.table import Method, Runner
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import InputError, UsageError
from hcma_fast.files import read_file, read_json, write_file
from hcma_fast.models.text import tokenize

BLOCK = 16
"""Images that a shard takes at a time, and that one file of measurements holds"""
RUN_FILE = "run.json"
_RUN_BYTES = 2**20
Progress = Callable[[str, int, int], None]
"""Called with (method, images done, images to do in this shard)"""


class RunSettings(BaseModel):
    """run.json: what makes the images, apart from the method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    preset: str
    backend: str
    device: str
    weights_hash: str
    engine_hash: str | None
    settings: AlignmentSettings
    """the checkpoint's own"""
    num_inference_steps: int
    seed: int
    """image i of the list has seed + i, whatever the method"""
    width: int
    height: int
    count: int
    items_hash: str
    data: str
    """where the layouts are from, in words"""
    attention_factor: int | None
    """resolution of attention that was asked for; None: the papers', or the UNet's own"""

    @property
    def digest(self) -> str:
        """Tells images of this run from others."""
        content = self.model_dump_json(exclude={"data"})
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class ImageRecord(BaseModel):
    """The file beside each image, written after it: what it is and what it cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    """digest of the run's settings"""
    id: str
    method: str
    settings: AlignmentSettings
    seed: int
    image_sha256: str
    batch_size: int = Field(ge=1)
    seconds: float
    """share of the batch"""
    unet_forward: float
    unet_backward: float
    aligner_passes: int
    peak_memory_mib: float
    """of the process on the CPU, of torch's allocations on CUDA, since the method began"""
    process: str
    """the process that made it: methods that share one share its memory"""
    losses: list[float | None]


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 1) of ``count``."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "2/4".

        Raises:
            UsageError.
        """
        first, slash, second = text.partition("/")
        if slash and first.isascii() and second.isascii() and first.isdigit() and second.isdigit():
            shard = cls(int(first), int(second))
            if 1 <= shard.index <= shard.count:
                return shard
        raise UsageError(
            "a shard reads I/N with 1 <= I <= N", value=text, remedy="For example 2/4."
        )

    def blocks(self, items: Sequence[EvalItem]) -> Iterator[tuple[int, Sequence[EvalItem]]]:
        """Its blocks, each with the number of its first item."""
        for start in range(0, len(items), BLOCK):
            if start // BLOCK % self.count == self.index - 1:
                yield start, items[start : start + BLOCK]


WHOLE = Shard()


def open_run(out: Path, settings: RunSettings, *, force: bool) -> None:
    """Make ``out`` the folder of this run, or go on in it.

    Raises:
        InputError: it holds another run (unless ``force``: then its images are replaced), or a file
            of another program under the name of ours.
    """
    path = out / RUN_FILE
    if path.exists() and not _is_run(path):
        raise InputError(
            "run.json is not one of hcma-fast eval, and is not replaced",
            value=str(path),
            remedy="Choose another --out, or move the file away.",
        )
    if path.exists() and not force:
        try:
            found = RunSettings.model_validate_json(read_file(path, "the settings of a run"))
        except ValidationError as error:
            raise InputError(
                "run.json is of another version of hcma-fast eval",
                value=str(path),
                remedy="Choose another --out, or use --force.",
            ) from error
        if found.digest == settings.digest:
            return
        changed = [
            name
            for name in RunSettings.model_fields
            if getattr(found, name) != getattr(settings, name)
        ]
        raise InputError(
            f"this folder holds a run with another {', '.join(changed)}",
            value=str(out),
            remedy="Choose another --out, or use --force to replace its images.",
        )
    out.mkdir(parents=True, exist_ok=True)
    write_file(path, (settings.model_dump_json(indent=2) + "\n").encode())


def _is_run(path: Path) -> bool:
    """Is it a run.json of ours, of any version?"""
    try:
        values = read_json(path, "the settings of a run", limit=_RUN_BYTES)
    except InputError:
        return False
    return isinstance(values, dict) and {"weights_hash", "items_hash", "seed"} <= values.keys()


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    # Linux: the process's peak falls back to what it holds now
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    return float(psutil.Process().memory_info().rss / 2**20)


def image_files(out: Path, method: Method, item: EvalItem) -> tuple[Path, Path]:
    """Paths of an image and of its record."""
    folder = out / method.folder
    return folder / f"{item.id}.png", folder / f"{item.id}.json"


def finished(out: Path, method: Method, item: EvalItem, run: str) -> ImageRecord | None:
    """The record of an image of this run, or None when there is none, or it is damaged."""
    picture, path = image_files(out, method, item)
    try:
        record = ImageRecord.model_validate_json(read_file(path, "the record of an image"))
        same = hashlib.sha256(read_file(picture, "an image")).hexdigest() == record.image_sha256
    except (InputError, ValidationError):
        return None
    return record if same and record.run == run else None


def check_plan(
    runner: Runner, methods: Sequence[Method], items: Sequence[EvalItem], batch_size: int
) -> None:
    """Everything that can be refused before the first image.

    Raises:
        UsageError, InputError: a text is too long, a method cannot run, the engines do not take
            such batches, or two methods have one name.
    """
    pipe = runner.pipe
    names = [method.folder.casefold() for method in methods]
    if len(set(names)) < len(names):
        raise UsageError(
            "a method is there twice", value=[m.label for m in methods], remedy="Name each once."
        )
    if not pipe.batch_range.min <= batch_size <= pipe.batch_range.max or (pipe.batch_range.min > 1):
        raise UsageError(
            f"these engines make batches of {pipe.batch_range} images, an evaluation needs 1 to "
            f"{batch_size}",
            value=batch_size,
            remedy="Build with a range: --batch 1:1:16.",
        )
    for texts, kind in (
        ({item.prompt for item in items}, "prompt"),
        ({item.negative_prompt for item in items}, "negative prompt"),
        ({phrase for item in items for phrase in item.layout.phrases}, "phrase"),
    ):
        tokenize(pipe.tokenizer, sorted(texts), kind)
    for method in methods:
        method.check(items, pipe.tokenizer, pipe.settings)
        if method.guided:
            runner.attention()


def generate(
    runner: Runner,
    methods: Sequence[Method],
    items: Sequence[EvalItem],
    run: RunSettings,
    out: Path,
    *,
    batch_size: int,
    shard: Shard = WHOLE,
    progress: Progress | None = None,
) -> int:
    """Make the images that are not there yet; returns how many it made.

    Raises:
        InputError: another process works on this shard. Else see :meth:`Runner.generate`.
    """
    lock = FileLock(out / f".shard-{shard.index}-of-{shard.count}.lock", timeout=0)
    try:
        with lock:
            return sum(
                _generate(runner, method, items, run, out, batch_size, shard, progress)
                for method in methods
            )
    except Timeout as error:
        raise InputError(
            "another process works on this shard",
            value=f"{shard.index}/{shard.count}",
            remedy="Wait for it, or take another --shard.",
        ) from error


def _generate(
    runner: Runner,
    method: Method,
    items: Sequence[EvalItem],
    run: RunSettings,
    out: Path,
    batch_size: int,
    shard: Shard,
    progress: Progress | None,
) -> int:
    (out / method.folder).mkdir(parents=True, exist_ok=True)
    blocks = list(shard.blocks(items))
    total, done, made = sum(len(block) for _, block in blocks), 0, 0
    device = runner.pipe.device
    _reset_peak(device)
    settings = method.settings(runner.pipe.settings)
    for start, block in blocks:
        seeds = {item.id: run.seed + start + i for i, item in enumerate(block)}
        missing = [item for item in block if finished(out, method, item, run.digest) is None]
        done += len(block) - len(missing)
        for first in range(0, len(missing), batch_size):
            batch = missing[first : first + batch_size]
            found = runner.generate(
                method, batch, run.num_inference_steps, [seeds[item.id] for item in batch]
            )
            for row, item in enumerate(batch):
                picture, path = image_files(out, method, item)
                content = png_bytes(Image.fromarray(found.images[row]))
                record = ImageRecord(
                    run=run.digest,
                    id=item.id,
                    method=method.label,
                    settings=settings,
                    seed=seeds[item.id],
                    image_sha256=hashlib.sha256(content).hexdigest(),
                    batch_size=len(batch),
                    seconds=found.seconds / len(batch),
                    unet_forward=found.unet_forward,
                    unet_backward=found.unet_backward,
                    aligner_passes=found.aligner_passes,
                    peak_memory_mib=_peak_mib(device),
                    process=f"{os.getpid()}-{psutil.Process().create_time():.0f}",
                    losses=found.losses[row],
                )
                write_file(picture, content)
                write_file(path, (record.model_dump_json() + "\n").encode())
            made += len(batch)
            done += len(batch)
            if progress is not None:
                progress(method.label, done, total)
    if progress is not None:
        progress(method.label, done, total)
    return made


def load_records(
    out: Path, method: Method, items: Sequence[EvalItem], run: RunSettings
) -> list[ImageRecord]:
    """All records of a method.

    Raises:
        InputError: images are missing, of another run, or damaged.
    """
    found = [finished(out, method, item, run.digest) for item in items]
    records = [record for record in found if record is not None]
    if len(records) < len(items):
        lost = [item.id for item, record in zip(items, found, strict=True) if record is None]
        raise InputError(
            f"{len(lost)} of {len(items)} images of {method.label} are missing",
            value=lost[0],
            remedy="Generate them first: run all shards, or leave out --stage.",
        )
    return records


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
