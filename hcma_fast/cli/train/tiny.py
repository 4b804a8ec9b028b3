"""``hcma-fast train text`` and ``train vae``: the first parts of `tiny`."""

from __future__ import annotations

import json
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
#: of the whole VAE, and of its decoder alone
_STEPS, _SCENES, _RATE = (2000, 1000), (16000, 30000), (0.003, 0.001)


def _shown(defaults: tuple[float, float]) -> str:
    return "{:g}; decoder {:g}".format(*defaults)


def text(
    out: _Out = _RUN,
    steps: Annotated[int, typer.Option(min=1, help="Steps in all.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Captions and labels a step.")] = 96,
) -> None:
    """Train tokenizer and text encoder on EmojiScenes' captions; prints the encoder's folder."""
    from hcma_fast.train.tiny.text import train_text

    typer.echo(train_text(out, steps=steps, batch=batch, on_log=_note))


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
    batch: Annotated[int, typer.Option(min=1, help="Scenes a step.")] = 16,
    scenes: Annotated[
        int | None,
        typer.Option(min=1, help="Scenes to draw.", show_default=_shown(_SCENES)),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=0, help="Learning rate.", show_default=_shown(_RATE)),
    ] = None,
) -> None:
    """Train the VAE on EmojiScenes; prints its folder.

    --decoder-only makes vae-sharp of vae: the latents that a denoiser learned stay valid.
    """
    from hcma_fast.train.tiny.vae import train_vae
    from hcma_fast.train.tiny.vae_decoder import train_decoder

    folder = (train_decoder if decoder_only else train_vae)(
        out,
        steps=_STEPS[decoder_only] if steps is None else steps,
        batch=batch,
        scenes=_SCENES[decoder_only] if scenes is None else scenes,
        lr=_RATE[decoder_only] if lr is None else lr,
        on_log=_note,
    )
    typer.echo(folder)


def _note(record: Record) -> None:
    if record.keys() == {"step", "steps"}:
        step, steps = record["step"], record["steps"]
        at = f"at step {step} of {steps}"
        print_note(f"Finished before, {at}." if step >= steps else f"Begins {at}.")
    else:
        print_note(json.dumps(record))
