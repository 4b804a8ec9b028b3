"""The work of ``generate``: open the pipeline, run the batches, write image, overlay, sidecar."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hcma_fast.cli.generate.jobs import Job, at
from hcma_fast.cli.generate.sidecar import FinalLosses, Sidecar, current_versions
from hcma_fast.cli.output import BuildProgress, stderr, write_file
from hcma_fast.config import PRESETS, AlignmentSettings, devices_of
from hcma_fast.errors import InputError, OutputError
from hcma_fast.sampling.savings import EXACT, Savings

if TYPE_CHECKING:
    from PIL import Image

    from hcma_fast.runtime.pipeline import HCMAOutput, HCMAPipeline


@dataclass(frozen=True)
class Plan:
    """Which model makes the images, and with which settings."""

    model: str
    aligner: Path | None
    backend: str | None
    """None leaves it to the engine folder that ``model`` names"""
    device: str | None
    precision: str | None
    steps: int
    overrides: dict[str, Any]
    """of the checkpoint's AlignmentSettings, by their names there; None keeps the default"""
    grad_backend: str | None = None
    cuda_graphs: bool = False
    savings: Savings = EXACT


@dataclass(frozen=True)
class Written:
    """The files of one finished image."""

    image: Path
    sidecar: Path
    overlay: Path | None
    record: Sidecar

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "image": str(self.image),
            "sidecar": str(self.sidecar),
            "overlay": str(self.overlay) if self.overlay else None,
            "record": self.record.model_dump(mode="json"),
        }


def is_engine_folder(model: str) -> bool:
    """Does ``model`` name a folder that ``hcma-fast build`` wrote?"""
    return (Path(model) / "manifest.json").is_file()


def open_pipeline(plan: Plan, jobs: Sequence[Job], original: Sidecar | None) -> HCMAPipeline:
    """Load the model (building its engines on first use) and check every text of ``jobs``.

    Args:
        original: the sidecar whose weights must be the same, if any.

    Raises:
        UsageError: a setting is out of range. InputError: a text is too long.
        WeightsError, BackendError, EngineError: the model does not load, or is not ``original``'s.
    """
    from hcma_fast.models.text import tokenize
    from hcma_fast.runtime.pipeline import HCMAPipeline
    from hcma_fast.runtime.requests import override_settings
    from hcma_fast.sampling.capture import check_capturable

    override_settings(AlignmentSettings(), **plan.overrides)
    if plan.cuda_graphs and plan.backend not in (None, "auto") and not is_engine_folder(plan.model):
        # before minutes go into building engines; of theirs it asks again, when they are open
        device = plan.device or devices_of(plan.backend)[0]
        check_capturable("step", device, plan.backend, plan.grad_backend, {})
    if original is not None and not is_engine_folder(plan.model):
        _check_checkpoint(plan, original)
    announcement = (
        f"Building engines for {plan.backend}, once for this model; the next run finds them in "
        "the cache."
    )
    with BuildProgress(announcement) as progress:
        pipe = HCMAPipeline.from_pretrained(
            plan.model,
            backend=plan.backend,
            device=plan.device,
            precision=plan.precision,
            aligner=plan.aligner,
            grad_backend=plan.grad_backend,
            progress=progress,
        )
    if plan.cuda_graphs:
        pipe.enable_cuda_graphs()
    if original is not None:
        original.check_weights(pipe.weights_hash)
    # before the first image, not in the middle of the batches; each text once
    texts: dict[tuple[str, str], str] = {}
    for job in jobs:
        texts.setdefault((job.prompt, "prompt"), job.where)
        texts.setdefault((job.negative_prompt, "negative prompt"), job.where)
        for phrase in job.layout.phrases:
            texts.setdefault((phrase, "phrase"), job.where)
    for (text, kind), where in texts.items():
        at(where, tokenize, pipe.tokenizer, [text], kind)
    return pipe


def _check_checkpoint(plan: Plan, original: Sidecar) -> None:
    """Refuse wrong weights before minutes go into building engines of them."""
    from hcma_fast.models.checkpoint.info import PARTS, hash_weights, resolve_folder

    folder = resolve_folder(plan.model)
    aligner = plan.aligner or folder / "aligner"
    if aligner.is_dir() and all((folder / part).is_dir() for part in PARTS):
        original.check_weights(hash_weights(folder, aligner))


def render(
    pipe: HCMAPipeline,
    plan: Plan,
    jobs: Sequence[Job],
    out: Path,
    *,
    batch_size: int,
    overlay: bool,
) -> list[Written]:
    """Make the images in batches; each batch is on the disk before the next one starts.

    Raises:
        UsageError: the latent diverged. DeviceMemoryError: the batch is too large.
        OutputError: a file cannot be written.
    """
    from hcma_fast.runtime.requests import call_arguments, override_settings

    settings = override_settings(pipe.settings, **plan.overrides)
    batch_size = min(batch_size, pipe.batch_range.max)
    least = len(jobs) % batch_size or batch_size
    if least < pipe.batch_range.min:
        raise InputError(
            f"these engines make batches of {pipe.batch_range} images, the last one would have "
            f"{least}",
            value=len(jobs),
            remedy=f"Ask for a multiple of {batch_size} images, or build with a range: --batch 1:1:"
            f"{batch_size}.",
        )
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    common: dict[str, Any] = {
        "num_inference_steps": plan.steps,
        "settings": settings,
        "savings": plan.savings,
        "model": plan.model if plan.model in PRESETS else _anywhere(Path(plan.model)),
        "aligner": _anywhere(plan.aligner) if plan.aligner else None,
        "preset": pipe.preset,
        "image_size": pipe.image_size,
        "height": pipe.image_shape[0],
        "width": pipe.image_shape[1],
        "precision": plan.precision,
        "backend": pipe.backend,
        "grad_backend": pipe.grad_backend,
        "cuda_graphs": pipe.replay is not None,
        "device": pipe.device,
        "weights_hash": pipe.weights_hash,
        "engine_hash": pipe.engine_hash,
        "versions": current_versions(pipe.backend),
    }
    written: list[Written] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        redirect_stdout=False,
    ) as progress:
        task = progress.add_task("steps", total=plan.steps * len(batches))
        for batch in batches:
            output = pipe(
                [job.prompt for job in batch],
                [job.layout for job in batch],
                num_inference_steps=plan.steps,
                negative_prompt=[job.negative_prompt for job in batch],
                seed=[job.seed for job in batch],
                callback_on_step_end=lambda *_: progress.advance(task),
                savings=plan.savings,
                **call_arguments(settings),
            )
            for row, job in enumerate(batch):
                losses = _final_losses(output, row, len(job.layout))
                record = {**common, "batch_size": len(batch), "losses": losses}
                written.append(_write(job, output.images[row], out, overlay, record))
    return written


def _final_losses(output: HCMAOutput, row: int, boxes: int) -> FinalLosses | None:
    if not output.losses:
        return None
    last = output.losses[-1]
    return FinalLosses(
        loss_global=float(last.loss_global[row]), loss_local=last.loss_local[row, :boxes].tolist()
    )


def _write(
    job: Job, image: Image.Image, out: Path, overlay: bool, record: dict[str, Any]
) -> Written:
    """The image first and the sidecar last: a sidecar always speaks of the image beside it."""
    image_path, sidecar_path, overlay_path = job.files(out)
    try:
        for stale in (sidecar_path, overlay_path):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError.from_os(error, out) from error
    content = _png(image)
    sidecar = Sidecar(
        image=image_path.name,
        image_sha256=hashlib.sha256(content).hexdigest(),
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        layout=job.layout,
        seed=job.seed,
        **record,
    )
    write_file(image_path, content)
    if overlay:
        from hcma_fast.overlay import draw_layout

        write_file(overlay_path, _png(draw_layout(image, job.layout)))
    write_file(sidecar_path, sidecar.to_bytes())
    return Written(image_path, sidecar_path, overlay_path if overlay else None, sidecar)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _anywhere(path: Path) -> str:
    """A name that means the same in every folder: a hub id stays, a folder's path gets absolute."""
    return str(path.resolve()) if path.is_dir() else str(path)
