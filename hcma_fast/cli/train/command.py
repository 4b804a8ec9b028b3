"""``hcma-fast train``: encode a data set once, train the aligner on it, tune the alignment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hcma_fast.cli.options import AsText
from hcma_fast.cli.output import print_json, print_note
from hcma_fast.cli.train.denoiser import denoiser
from hcma_fast.cli.train.run import (
    Bf16,
    CheckpointEvery,
    Cpu,
    Keep,
    MaxSteps,
    Out,
    SampleEvery,
    StepBar,
    Tensorboard,
    Workers,
    setting,
    training_bar,
    training_settings,
)
from hcma_fast.cli.train.tiny import text, vae
from hcma_fast.cli.train.tune import tune_alignment
from hcma_fast.cli.verbs import PLAIN_HELP
from hcma_fast.config import PRESETS, RegionMode
from hcma_fast.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

    from hcma_fast.train.data.encode import CacheReport
    from hcma_fast.train.data.latent_cache import CacheHeader
    from hcma_fast.train.loop.samples import SamplePlan

train_app = typer.Typer(
    help="Train the aligner, tune the alignment. Results on stdout, progress on stderr.",
    no_args_is_help=True,
    rich_markup_mode=PLAIN_HELP,
)
train_app.command(short_help="Train GLIGEN's layers (stage 2 of Algorithm 1).")(denoiser)
train_app.command(short_help="Train tiny's tokenizer and text encoder.")(text)
train_app.command(short_help="Train tiny's VAE, or its decoder further.")(vae)
train_app.command("tune-alignment", short_help="Search eta0, window and lambdas.")(tune_alignment)
_Preset = Literal["tiny", "sd14"]


@train_app.command(short_help="Encode a data set's images and texts, once.")
def cache(
    data: Annotated[
        Path, typer.Option(help="Folder with SPLIT/ and annotations/ in COCO's format.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the cache; an unfinished one goes on.")],
    split: Annotated[str, typer.Option(help="train2014, or the name of another split.")] = (
        "train2014"
    ),
    model: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}, a folder in diffusers' layout or a hub id.")
    ] = "tiny",
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Side of the crops in pixels.", show_default="the model's own"),
    ] = None,
    flip: Annotated[bool, typer.Option(help="Also encode the mirrored images.")] = True,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out unusable records and images, and list them."),
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder below which file names of images may be absolute or have '..'.",
            show_default="names must stay in SPLIT/",
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a file.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 16,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode images; 0 for none of their own.")
    ] = 0,
    share: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="This run makes every N-th shard, from the I-th on (from 0)."
        ),
    ] = "0/1",
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda where there is one, else cpu"),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="What the VAE computes in.")
    ] = "float32",
    json_: AsText = False,
) -> None:
    """Encode images to VAE posteriors, captions and labels to text embeddings, once."""
    part = _share(share)
    from dataclasses import asdict

    from hcma_fast.train.data.encode import make_cache
    from hcma_fast.train.data.encoders import Encoders

    encoders = Encoders.load(model, _device(device), precision)
    with training_bar() as progress:
        task = progress.add_task("images", total=None, note="")

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        report = make_cache(
            data,
            split,
            encoders,
            out,
            image_size=size,
            flip=flip,
            skip_bad=skip_bad,
            shard_size=shard_size,
            batch_size=batch_size,
            workers=workers,
            share=part,
            image_root=root,
            progress=advance,
        )
    _print_findings(report)
    if json_:
        print_json(asdict(report))
        return
    typer.echo(
        f"{report.images} images, {report.boxes} boxes, {report.captions} captions in {out}; "
        f"{report.encoded} encoded by this run, {len(report.skipped)} skipped"
    )


def _print_findings(report: CacheReport) -> None:
    for record in report.skipped:
        print_note(f"skipped: {record.why} ({record.path})")
    for change, count in sorted(report.changes.items()):
        print_note(f"images {change}: {count}")
    if report.empty_boxes:
        print_note(f"boxes left out, as they have no area inside the image: {report.empty_boxes}")
    if report.cut_captions:
        print_note(f"{report.cut_captions} captions were longer than the text encoder takes: cut.")


@train_app.command(short_help="Train the aligner (stage 1 of Algorithm 1).")
def aligner(
    cache: Annotated[Path, typer.Option(help="Folder that hcma-fast train cache made.")],
    out: Out,
    preset: Annotated[
        _Preset | None,
        typer.Option(help="Architecture and settings.", show_default="the cache's"),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Aligner to start from.", show_default="random weights")
    ] = None,
    region: Annotated[RegionMode, typer.Option(help="Region map.")] = "coverage+fourier",
    time_conditioning: Annotated[
        Literal["none", "adaln"], typer.Option(help="How the aligner is told the noise level.")
    ] = "none",
    epochs: Annotated[int | None, setting("epochs", "60; tiny 4")] = None,
    batch: Annotated[int | None, setting("batch", "1024; tiny 64")] = None,
    micro_batch: Annotated[int | None, setting("micro_batch", "128; tiny 64")] = None,
    lr: Annotated[float | None, setting("lr", "0.001")] = None,
    weight_decay: Annotated[float | None, setting("weight_decay", "0.0005")] = None,
    decoupled_decay: Annotated[
        bool | None, setting("decoupled_decay", "l2-decay; tiny decoupled-decay")
    ] = None,
    warmup: Annotated[int | None, setting("warmup", "0; tiny 100")] = None,
    cosine: Annotated[bool | None, setting("cosine", "constant; tiny cosine")] = None,
    clip_norm: Annotated[float | None, setting("clip_norm", "none; tiny 1")] = None,
    ema_decay: Annotated[float | None, setting("ema_decay", "0; tiny 0.995")] = None,
    bf16: Bf16 = False,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and noise.")] = 0,
    max_steps: MaxSteps = None,
    workers: Workers = 0,
    log_every: Annotated[int | None, setting("log_every", "10; tiny 50")] = None,
    checkpoint_every: CheckpointEvery = None,
    keep: Keep = None,
    tensorboard: Tensorboard = True,
    sample_every: SampleEvery = None,
    sample_data: Annotated[
        Path | None, typer.Option(help="Folder that the cache was made from, for --sample-every.")
    ] = None,
    sample_model: Annotated[
        str | None,
        typer.Option(help="Model to draw with.", show_default="the cache's preset, if embedded"),
    ] = None,
    cpu: Cpu = False,
) -> None:
    """Train the aligner (stage 1 of the paper's Algorithm 1); prints the best one's folder.

    Under accelerate launch or torchrun it is one process of many.
    """
    from hcma_fast.train.data.latent_cache import read_header

    header = read_header(cache)
    chosen = preset or header.preset
    if chosen not in ("tiny", "sd14"):
        raise UsageError(
            "no aligner is known for this cache's preset", value=chosen, remedy="Give --preset."
        )
    from hcma_fast.train.aligner.settings import TINY, AlignerTraining

    base = TINY if chosen == "tiny" else AlignerTraining()
    training = training_settings(base, locals(), "aligner")

    from accelerate import PartialState

    from hcma_fast.models.aligner import Aligner
    from hcma_fast.seeds import seed_torch
    from hcma_fast.train.aligner.settings import architecture
    from hcma_fast.train.aligner.train import train_aligner
    from hcma_fast.train.loop.run_folder import check_provenance

    samples = _samples(header, sample_every, sample_data, sample_model)
    seed_torch(seed)
    if init is not None:
        check_provenance(init, header)
        model = Aligner.from_pretrained(init)
    else:
        shape = architecture("tiny" if chosen == "tiny" else "sd14")
        update = {"region": region, "time_conditioning": time_conditioning}
        model = Aligner(shape.model_copy(update=update))
    with training_bar() as progress:
        best = train_aligner(
            cache, out, training, model, cpu=cpu, samples=samples, progress=StepBar(progress)
        )
    if PartialState().is_main_process:
        typer.echo(best)


def _samples(
    header: CacheHeader, every: int | None, data: Path | None, model: str | None
) -> SamplePlan | None:
    if every is None:
        return None
    if data is None:
        raise UsageError(
            "--sample-every needs the captions, which a cache does not hold",
            value=every,
            remedy="Give the folder that the cache was made from by --sample-data.",
        )
    name = model or header.preset
    if model is None and name not in PRESETS:
        raise UsageError(
            "no model is known to draw samples with",
            value=name,
            remedy="Give the model that the cache was made with by --sample-model.",
        )
    from hcma_fast.models.checkpoint.folder import load_components
    from hcma_fast.train.loop.samples import plan_samples

    return plan_samples(load_components(name), data, header, every)


def _share(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if slash and index.isdigit() and count.isdigit() and int(index) < int(count):
        return int(index), int(count)
    raise UsageError("a share must read I/N, with I from 0 to N - 1", value=text, remedy="0/8")


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            "this device cannot be used", value=name, remedy="Give cpu, or a GPU that torch sees."
        ) from error
    return device
