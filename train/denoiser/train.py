"""Stage 2 of Algorithm 1: train GLIGEN's layers on aligned latents, on one process or many.

The frozen text encoder runs in each step: the cache holds pooled captions alone, and the hidden
states that the UNet reads would be ten times as large as its latents (docs/decisions.md).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import InputError, UsageError, WeightsError
from hcma_fast.models.checkpoint.folder import load_components, locate
from hcma_fast.train.aligner.settings import check_fits
from hcma_fast.train.data.coco import read_captions
from hcma_fast.train.data.encode import hash_annotations
from hcma_fast.train.data.encoders import made_with
from hcma_fast.train.data.latent_cache import LatentCache
from hcma_fast.train.denoiser.export import CheckpointWriter
from hcma_fast.train.denoiser.objective import NoiseObjective
from hcma_fast.train.denoiser.settings import FREE, DenoiserTraining
from hcma_fast.train.loop.run_folder import Provenance, RunFolder, check_provenance
from hcma_fast.train.loop.samples import plan_samples
from hcma_fast.train.loop.stage import Report, Stage, make_accelerator, train_stage


def train_denoiser(
    model: str | Path,
    cache: Path,
    data: Path,
    out: Path,
    training: DenoiserTraining,
    *,
    aligner: Path | None = None,
    cpu: bool = False,
    sample_every: int | None = None,
    progress: Report = lambda *_: None,
) -> Path:
    """Train a model's gated layers from the newest state in ``out``; returns the best one's folder.

    Starts under ``accelerate launch`` or ``torchrun`` as one of their processes.

    Args:
        model: a preset, a folder in diffusers' layout or a hub id; it stays as it is.
        cache: folder of a cache made with this model.
        data: folder that the cache was made from; its annotations are read, and for samples its
            list of images.
        aligner: folder of the frozen aligner; default the model's own.
        sample_every: steps between sheets of samples.
        progress: called in the main process with steps done, steps in all, and the record where
            one was logged.

    Raises:
        InputError: the cache is unfinished, damaged or has no image in a part; ``data`` is not
            what it was made from.
        WeightsError: a part of the model is missing, unsafe or does not fit the cache; the state is
            of another run.
        UsageError: the batch does not divide, or is larger than the data; images are to be aligned
            at rate 0.
        DivergenceError: loss or gradient is not finite; the batch was saved.
        OutputError: ``out`` cannot be written, or the disk is full.
    """
    opened = LatentCache(cache)
    captions = cached_captions(opened, data)
    source = locate(model, aligner=aligner)
    parts = load_components(source)
    if not parts.gated:
        raise WeightsError(
            "the UNet has no gated attention to be trained",
            value=str(model),
            remedy="Use a GLIGEN checkpoint such as masterful/gligen-1-4-generation-text-box.",
        )
    check_fits(parts.own_aligner.config, opened.header, "the aligner")
    if source.aligner_folder is None or not source.folder.is_dir():
        raise WeightsError(
            "the training needs a model's folder, and not a single file",
            value=str(source.folder),
            remedy="Write one with hcma-fast convert SOURCE --aligner FOLDER --out FOLDER.",
        )
    check_provenance(source.aligner_folder, opened.header)
    if not made_with(opened.header, parts):
        raise WeightsError(
            "the cache was made with another model: its encoders differ",
            value=str(model),
            remedy="Make a cache with this one, by hcma-fast train cache --model.",
        )
    parts = replace(parts, settings=_rate(parts.settings, training))
    plan = None
    if sample_every is not None:
        plan = plan_samples(parts, data, opened.header, sample_every)
    accelerator = make_accelerator(cpu=cpu)
    provenance = Provenance(
        cache=opened.header.digest,
        vae_sha256=opened.header.vae_sha256,
        text_sha256=opened.header.text_sha256,
        architecture={"model_and_aligner_sha256": parts.weights_hash},
        training=training.model_dump(mode="json", exclude=FREE),
    )
    main = accelerator.is_main_process
    run = RunFolder(out, "denoiser", provenance, main=main, keep=training.keep)
    write = CheckpointWriter(source, parts.info, provenance)
    for folder in (run.best_folder, run.last_folder):
        write.check(folder)
    objective = NoiseObjective(parts, opened, captions, training, accelerator.device, write)
    stage = Stage(opened, objective, training, accelerator, run.work)
    return train_stage(stage, run, plan, progress)


def cached_captions(cache: LatentCache, data: Path) -> list[str]:
    """The captions of the cache, in its order, from the folder that it was made from.

    Raises:
        InputError: ``data`` cannot be read, or the cache was made from other annotations.
    """
    split = cache.header.split
    texts = read_captions(data, split, skip_bad=cache.header.skip_bad)
    try:
        same = hash_annotations(data, split) == cache.header.annotations_sha256
    except OSError as error:
        raise InputError(
            f"cannot read the annotations: {error.strerror}",
            value=str(error.filename),
            remedy="Give the folder that the cache was made from by --data.",
        ) from error
    found = [texts.get(number, ()) for number in cache.image_ids.tolist()]
    if not same or [len(lines) for lines in found] != cache.caption_counts.tolist():
        raise InputError(
            "the cache was made from other annotations",
            value=str(data),
            remedy="Give the folder that the cache was made from by --data.",
        )
    return [text for lines in found for text in lines]


def _rate(settings: AlignmentSettings, training: DenoiserTraining) -> AlignmentSettings:
    """The alignment in training, which is that of the exported model."""
    if training.eta0 is not None:
        settings = settings.model_copy(update={"eta0": training.eta0})
    if training.aligned_share and not settings.eta0:
        raise UsageError(
            "the model's eta0 is 0, which would align nothing",
            value=training.aligned_share,
            remedy="Give --eta0, or --aligned-share 0.",
        )
    return settings
