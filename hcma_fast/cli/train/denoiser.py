"""``hcma-fast train denoiser``: stage 2, GLIGEN's layers on aligned latents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

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
from hcma_fast.config import PRESETS


def denoiser(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}, a folder in diffusers' layout or a hub id.")
    ],
    cache: Annotated[Path, typer.Option(help="Cache that was made with this model.")],
    data: Annotated[
        Path, typer.Option(help="Folder that the cache was made from: it has the captions.")
    ],
    out: Out,
    aligner: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the aligner, which stays as it is.", show_default="the model's own"
        ),
    ] = None,
    trainable: Annotated[
        Literal["fuser", "all"],
        typer.Option(help="GLIGEN's gated layers and position net, or the whole UNet."),
    ] = "fuser",
    aligned_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of latents aligned first.", show_default="0.5"),
    ] = None,
    eta0: Annotated[
        float | None,
        typer.Option(
            min=0, help="Rate of sampling; the result has it.", show_default="the model's"
        ),
    ] = None,
    rates: Annotated[
        Literal["uniform", "fixed"],
        typer.Option(help="Align at rates from 0 to twice eta0, or at eta0."),
    ] = "uniform",
    drop_caption: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share without caption.", show_default="0.5"),
    ] = None,
    drop_boxes: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share without boxes.", show_default="0.1"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Less memory: activations are computed twice."
        ),
    ] = False,
    epochs: Annotated[int | None, setting("epochs", "10")] = None,
    batch: Annotated[int | None, setting("batch", "64")] = None,
    micro_batch: Annotated[int | None, setting("micro_batch", "8")] = None,
    lr: Annotated[float | None, setting("lr", "5e-05")] = None,
    weight_decay: Annotated[float | None, setting("weight_decay", "0")] = None,
    decoupled_decay: Annotated[bool | None, setting("decoupled_decay", "decoupled-decay")] = None,
    warmup: Annotated[int | None, setting("warmup", "1000")] = None,
    cosine: Annotated[bool | None, setting("cosine", "constant")] = None,
    clip_norm: Annotated[float | None, setting("clip_norm", "none")] = None,
    ema_decay: Annotated[float | None, setting("ema_decay", "0")] = None,
    bf16: Bf16 = False,
    seed: Annotated[int, typer.Option(min=0, help="Of order and noise.")] = 0,
    max_steps: MaxSteps = None,
    workers: Workers = 0,
    log_every: Annotated[int | None, setting("log_every", "10")] = None,
    checkpoint_every: CheckpointEvery = None,
    keep: Keep = None,
    tensorboard: Tensorboard = True,
    sample_every: SampleEvery = None,
    cpu: Cpu = False,
) -> None:
    """Train the gated layers on aligned latents (stage 2 of the paper's Algorithm 1); prints the
    best model's folder.

    Under accelerate launch or torchrun it is one process of many.
    """
    from hcma_fast.train.denoiser.settings import DenoiserTraining

    training = training_settings(DenoiserTraining(), locals(), "denoiser")

    from accelerate import PartialState

    from hcma_fast.train.denoiser.train import train_denoiser

    with training_bar() as progress:
        best = train_denoiser(
            model,
            cache,
            data,
            out,
            training,
            aligner=aligner,
            cpu=cpu,
            sample_every=sample_every,
            progress=StepBar(progress),
        )
    if PartialState().is_main_process:
        typer.echo(best)
