"""The work of ``generate``: open the pipeline, run the batches, write image, overlay, sidecar."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hcma_fast.cli.generate.jobs import Job, at
from hcma_fast.cli.generate.resume import Finished, find_finished
from hcma_fast.cli.generate.sidecar import FinalLosses, Sidecar, current_versions
from hcma_fast.cli.output import BuildProgress, print_note, stderr, write_file
from hcma_fast.config import PRESETS, AlignmentSettings, devices_of
from hcma_fast.errors import InputError, OutputError, WeightsError
from hcma_fast.files import is_file
from hcma_fast.models.checkpoint.options import DEFAULTS, ModelOptions
from hcma_fast.sampling.savings import EXACT, Savings

if TYPE_CHECKING:
    from PIL import Image

    from hcma_fast.models.checkpoint.located import Checkpoint
    from hcma_fast.runtime.output import HCMAOutput
    from hcma_fast.runtime.pipeline import HCMAPipeline


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
    verify_key: Path | None = None
    """must have signed the engine folder that ``model`` names"""
    offline: bool = False
    """never ask the hub for ``model``: it is named by a file, not by the user"""
    options: ModelOptions = DEFAULTS
    """what ``model`` is put together from beside its own files"""


@dataclass(frozen=True)
class Written:
    """The files of one finished image."""

    image: Path
    sidecar: Path
    overlay: Path | None
    record: Sidecar
    skipped: bool = False
    """it was there already"""

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "image": str(self.image),
            "sidecar": str(self.sidecar),
            "overlay": str(self.overlay) if self.overlay else None,
            "skipped": self.skipped,
            "record": self.record.model_dump(mode="json"),
        }


def is_engine_folder(model: str) -> bool:
    """Does ``model`` name a folder that ``hcma-fast build`` wrote?"""
    return is_file(Path(model) / "manifest.json")


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
    source = plan.model if original is None else _same_weights(plan, original)
    announcement = (
        f"Building engines for {plan.backend}, once for this model; the next run finds them in "
        "the cache."
    )
    with BuildProgress(announcement) as progress:
        pipe = HCMAPipeline.from_pretrained(
            source,
            backend=plan.backend,
            device=plan.device,
            precision=plan.precision,
            aligner=plan.aligner,
            gligen=plan.options.gligen,
            vae=plan.options.vae,
            clip_skip=plan.options.clip_skip,
            loras=plan.options.loras,
            grad_backend=plan.grad_backend,
            verify_key=plan.verify_key,
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


def _same_weights(plan: Plan, original: Sidecar) -> str | Checkpoint:
    """The model, located; its weights' hash is compared before anything of it is loaded.

    Raises:
        WeightsError: it is not on this machine and may not be downloaded, or has other weights.
        EngineError: an engine folder is damaged.
    """
    from hcma_fast.export.manifest import read_manifest
    from hcma_fast.models.checkpoint.hub import is_hub_id
    from hcma_fast.models.checkpoint.info import resolve
    from hcma_fast.models.checkpoint.located import locate

    if is_engine_folder(plan.model):
        original.check_weights(read_manifest(Path(plan.model)).weights_hash)
        return plan.model
    try:
        folder = resolve(plan.model, offline=plan.offline)
    except WeightsError as error:
        if not (plan.offline and is_hub_id(plan.model)):
            raise
        raise WeightsError(
            "the sidecar names a model that is not on this machine",
            value=plan.model,
            remedy="If you trust the sidecar, add --allow-download to fetch the model from the "
            "hub; or give the model as --model.",
        ) from error
    return locate(
        folder, aligner=plan.aligner, options=plan.options, check_hash=original.check_weights
    )


def render(
    pipe: HCMAPipeline,
    plan: Plan,
    jobs: Sequence[Job],
    out: Path,
    *,
    batch_size: int,
    overlay: bool,
    skip_existing: bool = False,
    force: bool = False,
) -> list[Written]:
    """Make the images in batches; each batch is on the disk before the next one starts.

    Args:
        skip_existing: leave out images that are there, see :func:`.resume.find_finished`.

    Raises:
        UsageError: the latent diverged. DeviceMemoryError: the batch is too large.
        OutputError: a file cannot be written.
    """
    from hcma_fast.runtime.requests import override_settings

    settings = override_settings(pipe.settings, **plan.overrides)
    common: dict[str, Any] = {
        "num_inference_steps": plan.steps,
        "settings": settings,
        "savings": plan.savings,
        "model": plan.model if plan.model in PRESETS else _anywhere(Path(plan.model)),
        "aligner": _anywhere(plan.aligner) if plan.aligner else None,
        "gligen": _anywhere(Path(plan.options.gligen)) if plan.options.gligen else None,
        "vae": _anywhere(Path(plan.options.vae)) if plan.options.vae else None,
        "clip_skip": plan.options.clip_skip,
        "loras": tuple(f"{_anywhere(Path(one.path))}:{one.scale}" for one in plan.options.loras),
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
    finished = (
        find_finished(jobs, out, common, force=force) if skip_existing else [None] * len(jobs)
    )
    todo = [job for job, match in zip(jobs, finished, strict=True) if match is None]
    made: list[Written] = []
    if len(todo) < len(jobs):
        print_note(f"{len(jobs) - len(todo)} of {len(jobs)} images are there already.")
    try:
        for batch in _batches(pipe, plan, todo, batch_size):
            made.extend(_make(pipe, plan, batch, out, overlay, common))
    except (KeyboardInterrupt, SystemExit):
        with suppress(OSError):  # the terminal may be gone
            done = len(jobs) - len(todo) + len(made)
            go_on = " To go on, run the same command with --skip-existing." if done else ""
            print_note(f"Stopped: {done} of {len(jobs)} images are done, in {out}.{go_on}")
        raise
    rest = iter(made)
    return [next(rest) if match is None else _kept(match, out, overlay) for match in finished]


def _kept(match: Finished, out: Path, overlay: bool) -> Written:
    image, sidecar, overlay_path = match.job.files(out)
    if overlay and not overlay_path.exists():
        from PIL import Image

        from hcma_fast.overlay import draw_layout

        with Image.open(image) as picture:
            write_file(overlay_path, _png(draw_layout(picture, match.job.layout)))
    return Written(image, sidecar, overlay_path if overlay else None, match.record, skipped=True)


@dataclass(frozen=True)
class _Batch:
    jobs: Sequence[Job]
    on_step: Callable[..., None]


def _batches(
    pipe: HCMAPipeline, plan: Plan, jobs: Sequence[Job], batch_size: int
) -> Iterator[_Batch]:
    """``jobs`` in batches that the engines can make, with a bar of their steps on stderr.

    Raises:
        InputError: the last batch is too small.
    """
    if not jobs:
        return
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
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        redirect_stdout=False,
    ) as progress:
        starts = range(0, len(jobs), batch_size)
        task = progress.add_task("steps", total=plan.steps * len(starts))
        for start in starts:
            yield _Batch(jobs[start : start + batch_size], lambda *_: progress.advance(task))


def _make(
    pipe: HCMAPipeline,
    plan: Plan,
    batch: _Batch,
    out: Path,
    overlay: bool,
    common: dict[str, Any],
) -> list[Written]:
    """The images of a batch, written."""
    from hcma_fast.runtime.requests import call_arguments

    jobs = batch.jobs
    output = pipe(
        [job.prompt for job in jobs],
        [job.layout for job in jobs],
        num_inference_steps=plan.steps,
        negative_prompt=[job.negative_prompt for job in jobs],
        seed=[job.seed for job in jobs],
        callback_on_step_end=batch.on_step,
        savings=plan.savings,
        **call_arguments(common["settings"]),
    )
    written = []
    for row, job in enumerate(jobs):
        losses = _final_losses(output, row, len(job.layout))
        record = {**common, "batch_size": len(jobs), "losses": losses}
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
    """A name that means the same in every folder: a hub id stays, a path gets absolute."""
    return str(path.resolve()) if path.is_dir() or path.is_file() else str(path)
