"""``hcma-fast build``: a model to an engine folder."""

from __future__ import annotations

from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich import box
from rich.table import Table

from hcma_fast.cli.options import (
    Aligner,
    Checkpoint,
    ClipSkip,
    Gligen,
    LoraFiles,
    Vae,
    json_option,
    model_options,
    precision_option,
)
from hcma_fast.cli.output import BuildProgress, print_json, print_note, stderr
from hcma_fast.config import check_backend
from hcma_fast.errors import EngineError, UsageError
from hcma_fast.models.checkpoint.options import DEFAULTS, ModelOptions

if TYPE_CHECKING:
    from hcma_fast.export.manifest import Manifest
    from hcma_fast.export.target import Target
    from hcma_fast.models.checkpoint.folder import ModelSource
    from hcma_fast.specs import TensorSpec

_MIB = 2**20


def build(
    *,
    model: Checkpoint = "tiny",
    backend: Annotated[str, typer.Option(help="auto, or a compiled backend.")] = "onnxruntime",
    precision: Annotated[str | None, precision_option("float32, or what the backend has")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu or cuda: what torch-compile compiles for, of this machine.",
            show_default="cpu",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Images at once: one size, such as 4, or min:opt:max.",
            show_default="any; 1:1:8 for TensorRT",
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Of the images, in pixels.", show_default="as trained")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Of the images, in pixels.", show_default="as trained")
    ] = None,
    gpu_arch: Annotated[
        str,
        typer.Option(
            help="GPUs for tensorrt-rtx, such as sm89,sm120.", show_default="the one that is here"
        ),
    ] = "",
    workspace: Annotated[
        int | None,
        typer.Option(
            help="Most scratch memory of a TensorRT layer, in MiB.", show_default="TensorRT's own"
        ),
    ] = None,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="TensorRT engines that are refitted at load.")
    ] = False,
    fuse: Annotated[
        str,
        typer.Option(
            help="step: also build graphs that do a whole step in one call, where all steps align."
        ),
    ] = "none",
    tuning: Annotated[
        str,
        typer.Option(
            help="autotune: torch-compile on a GPU searches for faster kernels, minutes a graph."
        ),
    ] = "default",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="sd14 at full size, with weights made up.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Engine folder.", show_default="one in the user's cache")
    ] = None,
    aligner: Aligner = None,
    gligen: Gligen = None,
    vae: Vae = None,
    clip_skip: ClipSkip = None,
    lora: LoraFiles = None,
    verify: Annotated[
        Path | None, typer.Option(help="Compare this engine folder with torch again; build none.")
    ] = None,
    verify_key: Annotated[
        Path | None,
        typer.Option(
            help="Public key (PEM) that must have signed the folder of --verify.",
            show_default="none",
        ),
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option(
            help="Sign the folder of --out with this ed25519 private key (PEM).",
            show_default="unsigned",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an engine folder, or build a cached one again.")
    ] = False,
    json_: Annotated[bool, json_option("the folder")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be built; write nothing.")
    ] = False,
) -> None:
    """Export and compile all six graphs, check each against torch, and write an engine folder.

    Prints the folder, which `generate --model` takes.
    """
    _check_backend(backend)
    if sign_key is not None and (out is None or verify is not None):
        raise UsageError(
            "--sign-key signs a folder that is built for --out, not one in the cache",
            value=str(sign_key),
            remedy="Add --out FOLDER, without --verify.",
        )
    if verify_key is not None and verify is None:
        raise UsageError(
            "--verify-key checks the signature of the folder of --verify",
            value=str(verify_key),
            remedy="Add --verify FOLDER; to sign what is built, use --sign-key.",
        )
    options = model_options(gligen, vae, clip_skip, lora)
    # libraries print while they export; stdout is for the result alone
    with redirect_stdout(stderr.file):
        if verify is not None:
            report = _verify(verify, _source(model, aligner, options, random_weights), verify_key)
        else:
            from hcma_fast.export.precision import Precision
            from hcma_fast.export.target import Target, default_precision
            from hcma_fast.specs import BatchRange

            if backend == "auto":
                from hcma_fast.export.open import choose_backend
                from hcma_fast.export.target import device_for

                choice = choose_backend(device, precision, build=True)
                print_note(f"Backend {choice.label}: {choice.why}.")
                name, precision = choice.backend, choice.precision
                # an option of torch-compile alone
                compiled_for = device_for(name, choice.device or "cpu")
                device = None if compiled_for == "cpu" else compiled_for
            else:
                name = backend
            target = Target(
                backend=name,
                device=cast(Literal["cpu", "cuda"], device or "cpu"),
                precision=cast(Precision, precision or default_precision(name)),
                batch=BatchRange.parse(batch) if batch else None,
                height=height,
                width=width,
                architectures=tuple(name.strip() for name in gpu_arch.split(",") if name.strip()),
                workspace_mib=workspace,
                strip_weights=strip_weights,
                fuse=cast(Literal["none", "step"], fuse),
                tuning=cast(Literal["default", "autotune"], tuning),
            )
            if target.device == "cuda" and not target.batch_range.static:
                print_note(
                    "A range of batches keeps torch's convolutions in the slower layout (NCHW): "
                    "--batch 1 builds for one size, with channels last."
                )
            if device is not None:
                from hcma_fast.runtime.arguments import check_device

                check_device(device, name)
            source = _source(model, aligner, options, random_weights)
            report = _build(source, target, out, force=force, dry_run=dry_run, sign_key=sign_key)
    if json_:
        print_json(report)
    else:
        typer.echo(report["folder"])


def _source(
    model: str, aligner: Path | None, options: ModelOptions, random_weights: bool
) -> ModelSource:
    if random_weights:
        from hcma_fast.models.checkpoint.random_sd14 import RandomSD14

        if model != "sd14" or aligner is not None or options != DEFAULTS:
            raise UsageError(
                "random weights are made for the preset sd14, aligner included",
                value=model,
                remedy="Use --model sd14 --random-weights.",
            )
        return RandomSD14()
    from hcma_fast.models.checkpoint.folder import load_components

    return load_components(model, aligner=aligner, options=options)


def _build(
    source: ModelSource,
    target: Target,
    out: Path | None,
    *,
    force: bool,
    dry_run: bool,
    sign_key: Path | None,
) -> dict[str, Any]:
    from hcma_fast.export.build import build as build_folder
    from hcma_fast.export.cache import cached_folder, find_or_build

    folder = cached_folder(source.weights_hash, target) if out is None else out
    start, end = source.info.alignment.window
    if target.fuse == "step" and (start, end) != (0.0, 1.0):
        print_note(
            f"Step graphs align at every step, and this model's window is {start:g} to {end:g}: "
            "they are used where a call asks for all steps (generate --align-window 0 1)."
        )
    if dry_run:
        return _plan(source, target, folder)
    with BuildProgress(f"Building engines for {target.backend}.") as progress:
        if out is None:
            opened = find_or_build(
                source.weights_hash, lambda: source, target, progress=progress, force=force
            )
            manifest = opened.manifest
            if not progress.started:
                print_note("These engines are in the cache already; --force builds them again.")
        else:
            manifest = build_folder(
                source, folder, target, progress=progress, force=force, sign_key=sign_key
            )
    stderr.print(_table(manifest, folder))
    return {"folder": str(folder), **manifest.model_dump(mode="json")}


def _verify(folder: Path, source: ModelSource, verify_key: Path | None) -> dict[str, Any]:
    from hcma_fast.export.open import verify

    table = Table("graph", box=box.SIMPLE)
    for column in ("parity now", "when built", "tolerance"):
        table.add_column(column, justify="right")
    found, wrong = {}, []
    for name, record, error in verify(folder, source, verify_key):
        found[name] = error
        table.add_row(name, f"{error:.1e}", f"{record.parity:.1e}", f"{record.tolerance:.0e}")
        if not error <= record.tolerance:
            wrong.append(name)
    stderr.print(table)
    if wrong:
        raise EngineError(
            f"these engines do not agree with torch: {', '.join(wrong)}",
            value=str(folder),
            remedy="Build them again: hcma-fast build --force.",
        )
    return {"folder": str(folder), "verified": found}


def _check_backend(backend: str) -> None:
    check_backend(backend, "auto")
    if backend == "eager":
        raise UsageError(
            "eager runs the weights as they are, there is nothing to build",
            value=backend,
            remedy="Use --backend onnxruntime, or generate --backend eager.",
        )


def _plan(source: ModelSource, target: Target, folder: Path) -> dict[str, Any]:
    from hcma_fast.export.estimate import estimate
    from hcma_fast.export.key import key_of, key_parts
    from hcma_fast.specs import ANY_BATCH

    signatures = source.specs(target.height, target.width, target.batch_range)
    specs = {name: signatures[name] for name in target.graphs_of(signatures)}
    parts = key_parts(source.weights_hash, target)
    needs = estimate(source, target)
    height, width = signatures["vae_decoder"].outputs[0].shape[2:]
    batch = "any batch" if target.batch_range == ANY_BATCH else f"batch {target.batch_range}"
    chosen = [target.backend, target.precision, batch, f"{height} x {width} pixels"]
    if target.native:
        machine = parts["machine"]
        chosen.append(f"for {machine if target.architectures else f'this machine ({machine})'}")
    chosen += [f"fused {target.fuse}"] if target.fuse != "none" else []
    chosen += ["stripped of weights"] if target.strip_weights else []
    chosen += [f"workspace {target.workspace_mib} MiB"] if target.workspace_mib else []
    print_note(f"Would build {', '.join(chosen)}:")
    table = Table("graph", "", "tensor", "shape", "dtype", box=box.SIMPLE)
    for name, spec in specs.items():
        for number, (way, tensor) in enumerate(
            [*(("in", entry) for entry in spec.inputs), *(("out", entry) for entry in spec.outputs)]
        ):
            shape = f"({', '.join(map(str, tensor.shape))})"
            table.add_row("" if number else name, way, tensor.name, shape, tensor.dtype)
    stderr.print(table)
    disk, peak, memory = (
        f"{size / _MIB:.0f} MiB"
        for size in (needs.disk_bytes, needs.peak_disk_bytes, needs.memory_bytes)
    )
    print_note(
        f"About {disk} on disk; while it builds, {peak} on disk and {memory} of memory. "
        "Nothing was built (--dry-run)."
    )
    return {
        "dry_run": True,
        "backend": target.backend,
        "precision": target.precision,
        "batch": str(target.batch_range),
        "height": height,
        "width": width,
        "folder": str(folder),
        "exists": folder.exists(),
        "weights_hash": source.weights_hash,
        "key": key_of(parts),
        "key_parts": parts,
        "estimated_disk_bytes": needs.disk_bytes,
        "estimated_peak_disk_bytes": needs.peak_disk_bytes,
        "estimated_memory_bytes": needs.memory_bytes,
        "graphs": {
            name: {
                "batch": str(spec.batch),
                "inputs": {tensor.name: _describe(tensor) for tensor in spec.inputs},
                "outputs": {tensor.name: _describe(tensor) for tensor in spec.outputs},
            }
            for name, spec in specs.items()
        },
    }


def _describe(tensor: TensorSpec) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": tensor.dtype}


def _table(manifest: Manifest, folder: Path) -> Table:
    table = Table("graph", box=box.SIMPLE)
    for column in ("MiB", "checked", "parity", "tolerance", "seconds"):
        table.add_column(column, justify="right")
    for name, graph in manifest.graphs.items():
        table.add_row(
            name,
            f"{graph.size_bytes / _MIB:.1f}",
            graph.checked,
            f"{graph.parity:.1e}",
            f"{graph.tolerance:.0e}",
            f"{graph.seconds:.1f}",
        )
    if "weights.bin" in manifest.files:
        size = (folder / "weights.bin").stat().st_size
        table.add_row("weights of all", f"{size / _MIB:.1f}")
    return table
