"""``hcma-fast train text`` and ``train vae``: the first parts of `tiny`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcma_fast.cli.output import print_note

if TYPE_CHECKING:
    from hcma_fast.train.loop.loop import Record

_Out = Annotated[
    Path, typer.Option(help="Folder of all of tiny's parts; what was stopped goes on.")
]
_RUN = Path(".runs/tiny")
_Edition = Annotated[
    int, typer.Option(min=1, max=2, help="Of EmojiScenes: 1 has 64 pixels, 2 has 128.")
]
#: of the whole VAE and of its decoder alone, by edition
_STEPS = {1: (2000, 1000), 2: (20000, 4000)}
_SCENES = {1: (16000, 30000), 2: (100000, 30000)}
_RATE = {1: (0.003, 0.001), 2: (0.001, 0.0005)}
_BATCH = {1: (16, 16), 2: (8, 8)}


def _shown(defaults: Mapping[int, tuple[float, float]]) -> str:
    first, second = defaults[1], defaults[2]
    return "{:g}, decoder {:g}; edition 2: {:g}, decoder {:g}".format(*first, *second)


def text(
    out: _Out = _RUN,
    steps: Annotated[int, typer.Option(min=1, help="Steps in all.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Captions and labels a step.")] = 96,
    edition: _Edition = 1,
) -> None:
    """Train tokenizer and text encoder on EmojiScenes' captions; prints the encoder's folder."""
    from hcma_fast.train.data.editions import EDITIONS
    from hcma_fast.train.tiny.text import train_text

    folder = train_text(out, steps=steps, batch=batch, on_log=_note, edition=EDITIONS[edition])
    typer.echo(folder)


def vae(
    out: _Out = _RUN,
    decoder_only: Annotated[
        bool,
        typer.Option(
            "--decoder-only",
            help="Train the decoder of the VAE in --out further, with the encoder as it is.",
        ),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in all.", show_default=_shown(_STEPS))
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Scenes a step.", show_default=_shown(_BATCH))
    ] = None,
    scenes: Annotated[
        int | None,
        typer.Option(min=1, help="Scenes to draw.", show_default=_shown(_SCENES)),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=0, help="Learning rate.", show_default=_shown(_RATE)),
    ] = None,
    edition: _Edition = 1,
) -> None:
    """Train the VAE on EmojiScenes; prints its folder.

    --decoder-only makes vae-sharp of vae: the latents that a denoiser learned stay valid.
    """
    from hcma_fast.train.data.editions import EDITIONS
    from hcma_fast.train.tiny.vae import train_vae
    from hcma_fast.train.tiny.vae_decoder import train_decoder

    folder = (train_decoder if decoder_only else train_vae)(
        out,
        steps=_STEPS[edition][decoder_only] if steps is None else steps,
        batch=_BATCH[edition][decoder_only] if batch is None else batch,
        scenes=_SCENES[edition][decoder_only] if scenes is None else scenes,
        lr=_RATE[edition][decoder_only] if lr is None else lr,
        on_log=_note,
        edition=EDITIONS[edition],
    )
    typer.echo(folder)


def _note(record: Record) -> None:
    if record.keys() == {"step", "steps"}:
        step, steps = record["step"], record["steps"]
        at = f"at step {step} of {steps}"
        print_note(f"Finished before, {at}." if step >= steps else f"Begins {at}.")
    else:
        print_note(json.dumps(record))
