"""``hcma-fast build``: a model to an engine folder."""

from __future__ import annotations

from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from hcma_fast.cli.output import BuildProgress, print_json, print_note, stderr
from hcma_fast.config import BACKENDS
from hcma_fast.errors import BackendError, UsageError

if TYPE_CHECKING:
    from hcma_fast.export.manifest import Manifest
    from hcma_fast.models.weights import Components
    from hcma_fast.specs import TensorSpec

_MIB = 2**20


def build(
    *,
    model: Annotated[str, typer.Option(help="Preset, folder or hub id.")] = "tiny",
    backend: Annotated[str, typer.Option(help="Compiled backend to build for.")] = "onnxruntime",
    out: Annotated[
        Path | None, typer.Option(help="Engine folder; by default one in the user's cache.")
    ] = None,
    aligner: Annotated[
        Path | None, typer.Option(help="Folder of the aligner, for a model that has none.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an engine folder, or build a cached one again.")
    ] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print a JSON report instead of the folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be built; write nothing.")
    ] = False,
) -> None:
    """Export all six graphs, check each against torch, and write an engine folder.

    Prints the folder, which `generate --model` takes.
    """
    _check_backend(backend)
    # libraries print while they export; stdout is for the result alone
    with redirect_stdout(stderr.file):
        report = _build(model, backend, out, aligner, force=force, dry_run=dry_run)
    if json_:
        print_json(report)
    else:
        typer.echo(report["folder"])


def _build(
    model: str, backend: str, out: Path | None, aligner: Path | None, *, force: bool, dry_run: bool
) -> dict[str, Any]:
    from hcma_fast.export.build import build as build_folder
    from hcma_fast.export.build import cached_folder, find_or_build, load_manifest
    from hcma_fast.models.weights import load_components

    components = load_components(model, aligner=aligner)
    folder = cached_folder(components.weights_hash, backend) if out is None else out
    if dry_run:
        return _plan(components, backend, folder)
    with BuildProgress(f"Building engines for {backend}.") as progress:
        if out is None:
            folder = find_or_build(components, backend, progress=progress, force=force)
            manifest = load_manifest(folder)
            if not progress.started:
                print_note("These engines are in the cache already; --force builds them again.")
        else:
            manifest = build_folder(components, folder, backend, progress=progress, force=force)
    stderr.print(_table(manifest))
    return {
        "folder": str(folder),
        "engine_hash": manifest.engine_hash,
        **manifest.model_dump(mode="json"),
    }


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(
            "unknown backend", value=backend, remedy=f"Backends: {', '.join(BACKENDS)}."
        )
    if backend == "eager":
        raise UsageError(
            "eager runs the weights as they are, there is nothing to build",
            value=backend,
            remedy="Use --backend onnxruntime, or generate --backend eager.",
        )


def _plan(components: Components, backend: str, folder: Path) -> dict[str, Any]:
    specs = components.specs()
    table = Table("graph", "", "tensor", "shape", "dtype", box=box.SIMPLE)
    for name, spec in specs.items():
        for number, (way, tensor) in enumerate(
            [*(("in", entry) for entry in spec.inputs), *(("out", entry) for entry in spec.outputs)]
        ):
            shape = f"({', '.join(map(str, tensor.shape))})"
            table.add_row("" if number else name, way, tensor.name, shape, tensor.dtype)
    stderr.print(table)
    print_note("Nothing was built (--dry-run).")
    return {
        "dry_run": True,
        "backend": backend,
        "folder": str(folder),
        "exists": folder.exists(),
        "weights_hash": components.weights_hash,
        "graphs": {
            name: {
                "inputs": {tensor.name: _describe(tensor) for tensor in spec.inputs},
                "outputs": {tensor.name: _describe(tensor) for tensor in spec.outputs},
            }
            for name, spec in specs.items()
        },
    }


def _describe(tensor: TensorSpec) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": tensor.dtype}


def _table(manifest: Manifest) -> Table:
    table = Table("graph", box=box.SIMPLE)
    for column in ("MiB", "parity", "tolerance", "seconds"):
        table.add_column(column, justify="right")
    for name, graph in manifest.graphs.items():
        table.add_row(
            name,
            f"{graph.size_bytes / _MIB:.1f}",
            f"{graph.parity:.1e}",
            f"{graph.tolerance:.0e}",
            f"{graph.seconds:.1f}",
        )
    return table
