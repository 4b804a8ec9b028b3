"""Options that several commands take, each defined once, and how their help looks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcma_fast.cli.request_options import field_option
from hcma_fast.config import BACKENDS
from hcma_fast.models.checkpoint.options import Lora, ModelOptions
from hcma_fast.runtime.request import Request

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


def precision_option(default: str) -> typer.models.OptionInfo:
    """An option for a precision, by either of its names; ``default`` in words."""
    found: typer.models.OptionInfo = typer.Option(
        callback=precision_name, help="float32, float16 or bfloat16.", show_default=default
    )
    return found


def backend_option(default: str | bool = True) -> typer.models.OptionInfo:
    """An option for a backend; ``default`` in words, where the argument's says nothing."""
    found: typer.models.OptionInfo = typer.Option(
        help=f"auto, or one of {', '.join(BACKENDS)}.", show_default=default
    )
    return found


def model_option(default: str | bool = True) -> typer.models.OptionInfo:
    """An option for what generates; ``default`` in words, where the argument's says nothing."""
    found: typer.models.OptionInfo = typer.Option(
        help="Preset, folder, single file, hub id or engine folder.", show_default=default
    )
    return found


def json_option(instead: str) -> typer.models.OptionInfo:
    """The switch for JSON on stdout ``instead`` of what people read."""
    found: typer.models.OptionInfo = typer.Option("--json", help=f"JSON instead of {instead}.")
    return found


DEFAULT_STEPS: int = Request.model_fields["num_inference_steps"].default
Steps = Annotated[int, field_option("num_inference_steps")]
FirstSeed = Annotated[int, field_option("seed")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images that are computed at once.")]
Backend = Annotated[str, backend_option()]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="the backend's own")]
Checkpoint = Annotated[str, typer.Option(help="Preset, folder, single file or hub id.")]
Model = Annotated[str, model_option()]
Aligner = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the aligner, for a model that has none.", show_default="the model's own"
    ),
]
AsTable = Annotated[bool, json_option("a table")]
AsTables = Annotated[bool, json_option("tables")]
AsText = Annotated[bool, json_option("text")]
AsMarkdown = Annotated[bool, json_option("Markdown")]
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
