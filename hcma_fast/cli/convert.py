"""``hcma-fast convert``: a model of any format to a folder of ours."""

from __future__ import annotations

from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich import box
from rich.table import Table

from hcma_fast.cli.options import ClipSkip, Gligen, LoraFiles, Vae, model_options, precision_name
from hcma_fast.cli.output import print_json, print_note, stderr
from hcma_fast.errors import UsageError


def convert(
    *,
    source: Annotated[
        str, typer.Argument(help="Single file, folder, or hub id with @REVISION perhaps.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="New folder.", show_default="needed without --dry-run")
    ] = None,
    gligen: Gligen = None,
    vae: Vae = None,
    clip_skip: ClipSkip = None,
    lora: LoraFiles = None,
    aligner: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the aligner, for a model that has none.", show_default="the model's own"
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(callback=precision_name, help="Stored as float32, float16 or bfloat16."),
    ] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what was recognised; write nothing.")
    ] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print a JSON report instead of the folder.")
    ] = False,
) -> None:
    """Write a model as a folder that loads at once: safetensors, hcma.json and sha256.txt.

    Takes single files of Stable Diffusion 1.x (.safetensors, .ckpt, .bin, .pth), GLIGEN's own
    checkpoints, folders in diffusers' layout and hub ids; the format is found out from the content.
    Prints the folder, which `generate --model` takes.
    """
    from hcma_fast.models.checkpoint.convert import StoredDtype, check_empty, describe
    from hcma_fast.models.checkpoint.convert import convert as convert_model
    from hcma_fast.models.checkpoint.located import locate

    if dtype not in get_args(StoredDtype):
        raise UsageError(
            "unknown number format",
            value=dtype,
            remedy=f"Use --dtype {', '.join(get_args(StoredDtype))}.",
        )
    if out is None and not dry_run:
        raise UsageError(
            "there is no folder to write to", remedy="Add --out FOLDER, or --dry-run to look only."
        )
    if out is not None:
        check_empty(out)
    with redirect_stdout(stderr.file):
        options = model_options(gligen, vae, clip_skip, lora)
        checkpoint = locate(source, aligner=aligner, options=options)
        report = describe(checkpoint)
        _tell(report)
        if dry_run:
            print_note("Nothing was written (--dry-run).")
        elif out is not None:
            info = convert_model(checkpoint, source, out, cast(StoredDtype, dtype))
            report |= {"folder": str(out), "info": info.model_dump(mode="json")}
    if json_:
        print_json({"dry_run": dry_run, **report})
    elif not dry_run:
        typer.echo(str(out))


def _tell(report: dict[str, Any]) -> None:
    table = Table("part", box=box.SIMPLE)
    table.add_column("parameters", justify="right")
    for part, count in report["parameters"].items():
        table.add_row(part, f"{count / 1e6:.1f} M")
    print_note(f"{report['source']}: {report['format']}.")
    stderr.print(table)
    print_note(
        f"{'With' if report['grounding'] else 'Without'} GLIGEN's layers; aligner: "
        f"{report['aligner'] or 'none'}."
    )
    if report["ignored_tensors"]:
        print_note(f"{report['ignored_tensors']} tensors are of no use for drawing, and left out.")
