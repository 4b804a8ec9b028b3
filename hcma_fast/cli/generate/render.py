"""The work of ``generate``: open the pipeline, run the batches, write image, overlay, sidecar."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hcma_fast.cli.generate.jobs import Job
from hcma_fast.cli.generate.resume import Finished, find_finished
from hcma_fast.cli.generate.sidecar import FinalLosses, Origin, Sidecar, current_versions
from hcma_fast.cli.output import BuildProgress, print_note, stderr
from hcma_fast.config import PRESETS, devices_of
from hcma_fast.errors import HcmaError, InputError, OutputError, WeightsError
from hcma_fast.files import is_file, write_file
from hcma_fast.models.checkpoint.options import DEFAULTS, ModelOptions

if TYPE_CHECKING:
    from PIL import Image

    from hcma_fast.models.checkpoint.located import Checkpoint
    from hcma_fast.runtime.pipeline import HCMAPipeline
    from hcma_fast.runtime.request import Result


@dataclass(frozen=True)
class Plan:
    """Which model makes the images, and how it is run."""

    model: str
    aligner: Path | None
    backend: str | None
    """None leaves it to the engine folder that ``model`` names"""
    device: str | None
    precision: str | None
    grad_backend: str | None = None
    cuda_graphs: bool = False
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
            "record": self.record.as_json(),
        }


def is_engine_folder(model: str) -> bool:
    """Does ``model`` name a folder that ``hcma-fast build`` wrote?"""
    return is_file(Path(model) / "manifest.json")


def open_pipeline(plan: Plan, original: Sidecar | None) -> HCMAPipeline:
    """Load the model, and build its engines on first use.

    Args:
        original: the sidecar whose weights must be the same, if any.

    Raises:
        WeightsError, BackendError, EngineError: the model does not load, or is not ``original``'s.
    """
    from hcma_fast.runtime.pipeline import HCMAPipeline
    from hcma_fast.sampling.capture import check_capturable

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
        InputError: a text is too long. UsageError: an image diverged; the others are written.
        DeviceMemoryError: not even one image fits. OutputError: a file cannot be written.
    """
    jobs = [replace(job, request=job.request.resolved(pipe.settings)) for job in jobs]
    common: dict[str, Any] = {
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
        "precision": pipe.precision,
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
    made: dict[int, Written] = {}
    failed: HcmaError | None = None
    if len(todo) < len(jobs):
        print_note(f"{len(jobs) - len(todo)} of {len(jobs)} images are there already.")
    try:
        for result in _results(pipe, todo, batch_size):
            if result.image is None:
                failed = failed or result.error
            else:
                job = todo[result.index]
                made[result.index] = _write(job, result, result.image, out, overlay, common)
    except (KeyboardInterrupt, SystemExit):
        with suppress(OSError):  # the terminal may be gone
            done = len(jobs) - len(todo) + len(made)
            go_on = " To go on, run the same command with --skip-existing." if done else ""
            print_note(f"Stopped: {done} of {len(jobs)} images are done, in {out}.{go_on}")
        raise
    except HcmaError as error:
        raise _in_their_words(error, todo) from error
    if failed is not None:
        raise _in_their_words(failed, todo) from failed
    rest = iter(made[index] for index in range(len(todo)))
    return [next(rest) if match is None else _kept(match, out, overlay) for match in finished]


def _in_their_words(error: HcmaError, jobs: Sequence[Job]) -> HcmaError:
    """An error of one request: it says the line of its file, and no number."""
    if error.request is None:
        return error
    where = jobs[error.request].where
    what = error.what.removeprefix(f"request {error.request}: ")
    found = type(error)(what, value=error.value, remedy=error.remedies)
    return found.at(where) if where else found


def _kept(match: Finished, out: Path, overlay: bool) -> Written:
    image, sidecar, overlay_path = match.job.files(out)
    if overlay and not overlay_path.exists():
        from PIL import Image

        from hcma_fast.overlay import draw_layout

        with Image.open(image) as picture:
            write_file(overlay_path, _png(draw_layout(picture, match.job.request.layout)))
    return Written(image, sidecar, overlay_path if overlay else None, match.record, skipped=True)


def _results(pipe: HCMAPipeline, jobs: Sequence[Job], batch_size: int) -> Iterator[Result]:
    """Results of the engine room, with a bar of the images' steps on stderr.

    Raises:
        InputError: the last batch is too small for the engines.
    """
    if not jobs:
        return
    from hcma_fast.runtime.generator import BatchGenerator

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
    generator = BatchGenerator(pipe, max_batch=batch_size, cached=False)
    requests = [job.request for job in jobs]
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        redirect_stdout=False,
    ) as progress:
        total = sum(request.num_inference_steps for request in requests)
        task = progress.add_task("steps", total=total)
        yield from generator.generate(requests, lambda images: progress.advance(task, images))


def _write(
    job: Job,
    result: Result,
    image: Image.Image,
    out: Path,
    overlay: bool,
    common: dict[str, Any],
) -> Written:
    """The image first and the sidecar last: a sidecar always speaks of the image beside it."""
    image_path, sidecar_path, overlay_path = job.files(out)
    try:
        for stale in (sidecar_path, overlay_path):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError.from_os(error, out) from error
    content = _png(image)
    layout = job.request.layout
    origin = Origin(
        image=image_path.name,
        image_sha256=hashlib.sha256(content).hexdigest(),
        batch_size=result.batch_size,
        losses=_final_losses(result, len(layout)),
        **common,
    )
    sidecar = Sidecar(job.request, origin)
    write_file(image_path, content)
    if overlay:
        from hcma_fast.overlay import draw_layout

        write_file(overlay_path, _png(draw_layout(image, layout)))
    write_file(sidecar_path, sidecar.to_bytes())
    return Written(image_path, sidecar_path, overlay_path if overlay else None, sidecar)


def _final_losses(result: Result, boxes: int) -> FinalLosses | None:
    if not result.losses:
        return None
    last = result.losses[-1]
    return FinalLosses(
        loss_global=float(last.loss_global), loss_local=last.loss_local[:boxes].tolist()
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _anywhere(path: Path) -> str:
    """A name that means the same in every folder: a hub id stays, a path gets absolute."""
    return str(path.resolve()) if path.is_dir() or path.is_file() else str(path)
