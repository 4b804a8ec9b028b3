"""Build engine folders: export, validate, hash, and put in place whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hcma_fast import specs
from hcma_fast.config import cache_root
from hcma_fast.errors import BackendError, EngineError, InputError
from hcma_fast.export.manifest import (
    MANIFEST_FILE,
    GraphRecord,
    Manifest,
    hash_file,
    hash_folder,
    load_manifest,
    sync_folder,
)
from hcma_fast.export.onnx_graph import OPSET, export_onnx
from hcma_fast.export.session import onnxruntime_version, open_session, runner
from hcma_fast.export.validate import TOLERANCE_FLOAT32, measure
from hcma_fast.models.weights import Components
from hcma_fast.specs import GraphName, IOSpec

__all__ = [
    "build",
    "cache_root",
    "cached_engine",
    "cached_folder",
    "find_or_build",
    "load_manifest",
]

COMPILED_BACKENDS = ("onnxruntime",)
Progress = Callable[[str, str], None]
_log = logging.getLogger("hcma_fast")
_PACKAGE = Path(specs.__file__).parent
#: whose code becomes part of the graphs
_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


def engine_key(weights_hash: str, backend: str) -> str:
    """What an engine depends on, as a hash: weights, backend, versions and our own graph code.

    Raises:
        BackendError: an unknown backend, or it is not installed.
    """
    parts = {
        "weights": weights_hash,
        "backend": backend,
        "backend_version": _backend_version(backend),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "opset": OPSET,
        "precision": "float32",
        "code": _code_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached_folder(weights_hash: str, backend: str) -> Path:
    """The folder in the user's cache where the engine is, or would be."""
    return cache_root() / f"{backend}-{engine_key(weights_hash, backend)[:24]}"


def cached_engine(weights_hash: str, backend: str) -> Path | None:
    """The engine folder in the user's cache, checked; None when it is missing or damaged.

    A damaged one is reported in the log.
    """
    folder = cached_folder(weights_hash, backend)
    if not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        load_manifest(folder)
    except EngineError as error:
        _log.warning("The cached engine is built again. %s", error)
        return None
    return folder


def find_or_build(
    components: Components,
    backend: str,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """The engine folder in the user's cache, built when it is missing or damaged, or by ``force``.

    Two processes that want the same engine build it once: the second waits for the first.

    Raises:
        BackendError, EngineError, InputError: see :func:`build`.
    """
    folder = cached_folder(components.weights_hash, backend)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.with_name(f".{folder.name}.lock")).acquire()
    except OSError as error:
        raise InputError(
            f"the engine cache cannot be written: {error.strerror}",
            value=str(folder.parent),
            remedy="Set HCMA_FAST_CACHE to a folder that you may write to.",
        ) from error
    with held:
        if force or cached_engine(components.weights_hash, backend) is None:
            # what a killed build left; the lock says that nobody is at work on it
            for leftover in folder.parent.glob(f".{folder.name}.*-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if not (folder / MANIFEST_FILE).is_file():
                # half an engine, after somebody's clean-up
                shutil.rmtree(folder, ignore_errors=True)
            build(components, folder, backend, progress=progress, force=True)
    return folder


def build(
    components: Components,
    folder: Path,
    backend: str = "onnxruntime",
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> Manifest:
    """Export and validate all six graphs into ``folder``.

    Args:
        progress: called with (graph, stage); stages are "export", "validate" and "done".
        force: replace an engine folder that is there already; anything else is never replaced.

    Raises:
        BackendError: an unknown backend, or it is not installed.
        InputError: ``folder`` holds something else, or cannot be written.
        EngineError: a graph does not agree with torch.
    """
    version = _backend_version(backend)
    folder = Path(os.path.abspath(folder))
    _check_target(folder, force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"the engine folder cannot be written: {error.strerror}",
            value=str(folder),
            remedy="Choose another folder with --out.",
        ) from error
    try:
        components.tokenizer.save_pretrained(partial / "tokenizer")
        graphs = _export_all(components, partial, progress or _no_progress)
        manifest = Manifest(
            backend=backend,
            backend_version=version,
            torch_version=torch.__version__,
            precision="float32",
            opset=OPSET,
            info=components.info,
            weights_hash=components.weights_hash,
            key=engine_key(components.weights_hash, backend),
            graphs=graphs,
            files=hash_folder(partial),
        )
        (partial / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
        partial.chmod(0o755)  # mkdtemp makes it private
        sync_folder(partial)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
            folder.rename(retired / "engine")
            partial.rename(folder)
            shutil.rmtree(retired)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _export_all(
    components: Components, folder: Path, progress: Progress
) -> dict[GraphName, GraphRecord]:
    signatures = components.specs()
    vocabulary = len(components.tokenizer)
    records: dict[GraphName, GraphRecord] = {}
    for name, module in components.graphs().items():
        spec, file, started = signatures[name], folder / f"{name}.onnx", time.monotonic()
        progress(name, "export")
        export_onnx(spec, module, file, vocabulary=vocabulary)
        progress(name, "validate")
        session = open_session(file)
        _check_names(spec, session)
        error = measure(spec, module, runner(session, spec), vocabulary=vocabulary)
        if not error <= TOLERANCE_FLOAT32:
            raise EngineError(
                f"the exported graph {name} does not agree with torch",
                value=f"relative error {error:.2e}, tolerance {TOLERANCE_FLOAT32:.0e}",
                remedy="This is a fault of the export: report it, with hcma-fast doctor.",
            )
        records[name] = GraphRecord(
            file=file.name,
            sha256=hash_file(file),
            size_bytes=file.stat().st_size,
            spec=spec,
            parity=error,
            tolerance=TOLERANCE_FLOAT32,
            seconds=round(time.monotonic() - started, 2),
        )
        progress(name, "done")
    return records


def _check_names(spec: IOSpec, session: Any) -> None:
    """A graph may drop an input that does not reach an output; then its caller would fail."""
    inputs = tuple(entry.name for entry in session.get_inputs())
    outputs = tuple(entry.name for entry in session.get_outputs())
    if (inputs, outputs) != (spec.input_names, spec.output_names):
        raise EngineError(
            f"the exported graph {spec.graph} has other inputs or outputs than its signature",
            value=f"{inputs} -> {outputs}",
            remedy="This is a fault of the export: report it, with hcma-fast doctor.",
        )


def _backend_version(backend: str) -> str:
    if backend not in COMPILED_BACKENDS:
        raise BackendError(
            "engines cannot be built for this backend",
            value=backend,
            remedy=f"Backends: {', '.join(COMPILED_BACKENDS)}.",
        )
    return onnxruntime_version()


def _code_hash() -> str:
    """Our own code decides what a graph computes: a changed line must not find an old engine."""
    digest = hashlib.sha256()
    files = [_PACKAGE / name for name in ("specs.py", "losses.py", "config.py")]
    folders = [Path(__file__).parent, _PACKAGE / "models"]
    for path in sorted([*files, *(p for folder in folders for p in folder.glob("*.py"))]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _check_target(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file()):
        raise InputError(
            "this is not an engine folder, so it is not replaced",
            value=str(folder),
            remedy="Choose another folder with --out.",
        )
    if not force and any(folder.iterdir()):
        raise InputError(
            "there is an engine in this folder already",
            value=str(folder),
            remedy="Add --force to replace it.",
        )


def _no_progress(graph: str, stage: str) -> None:
    """Nobody watches."""
