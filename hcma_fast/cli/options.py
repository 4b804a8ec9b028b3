"""Words that several commands take, and how their help looks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcma_fast.models.checkpoint.options import Lora, ModelOptions

#: typer's rich_markup_mode. Its boxes leave a text 18 of 80 columns, and lose words in brackets
PLAIN_HELP: None = None

_PRECISIONS = {
    "fp32": "float32",
    "f32": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}


def precision_name(given: str | None) -> str | None:
    """torch's name of a precision for the short one; anything else as it is, to be checked later.

    A callback of typer's options.
    """
    return _PRECISIONS.get(given, given) if given else given


Gligen = Annotated[
    Path | None,
    typer.Option(
        help="File with GLIGEN's layers, for a model that has none.",
        show_default="the model's own",
    ),
]
Vae = Annotated[
    Path | None, typer.Option(help="File of another VAE.", show_default="the model's own")
]
ClipSkip = Annotated[
    int | None,
    typer.Option(
        help="Read captions this many layers before the text encoder's end; 1 is the end.",
        show_default="the model's own",
    ),
]
LoraFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", help="FILE or FILE:SCALE of a LoRA, folded in; repeatable.", show_default="none"
    ),
]


def model_options(
    gligen: Path | None, vae: Path | None, clip_skip: int | None, lora: list[str] | None
) -> ModelOptions:
    """What these options say.

    Raises:
        WeightsError: a number is out of its range.
    """
    return ModelOptions(gligen, vae, clip_skip, tuple(Lora.parse(text) for text in lora or ()))
