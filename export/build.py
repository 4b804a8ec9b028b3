"""Build engine folders: export, compile, validate, hash, and put in place whole or not at all."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from hcma_fast.errors import EngineError, HcmaError, InputError
from hcma_fast.export.compile import compile_engine, export_graph, open_graph
from hcma_fast.export.estimate import check_resources, graph_weights
from hcma_fast.export.key import key_of, key_parts
from hcma_fast.export.manifest import (
    MANIFEST_FILE,
    GraphRecord,
    Manifest,
    hash_file,
    hash_folder,
)
from hcma_fast.export.onnx.export import OPSET
from hcma_fast.export.precision import Precision, at_precision, graph_precision
from hcma_fast.export.removal import RETIRED, engine_files, remove_engine
from hcma_fast.export.signing import Signer
from hcma_fast.export.target import TRT_LIBRARIES, Target, backend_version, check_buildable
from hcma_fast.export.validate import MANY_WEIGHTS, TOLERANCES, cases_for, compare, references
from hcma_fast.export.weights_file import WEIGHTS_FILE, WeightsFile
from hcma_fast.files import sync_folder
from hcma_fast.models.checkpoint.folder import ModelSource
from hcma_fast.sampling.exported import graph_of
from hcma_fast.specs import GraphName, IOSpec
from hcma_fast.torch_state import neutral_torch

Progress = Callable[[str, str], None]
_log = logging.getLogger("hcma_fast")


@neutral_torch()
def build(
    source: ModelSource,
    folder: Path,
    target: Target,
    *,
    progress: Progress | None = None,
    force: bool = False,
    sign_key: Path | None = None,
) -> Manifest:
    """Export, compile and validate all graphs of ``target`` into ``folder``.

    Args:
        progress: called with (graph, stage), by two threads; stages are "export", "validate",
            "compile" (TensorRT; torch-compile instead of "export"), "done".
        force: replace an engine folder that is there already. Anything else is never replaced, nor
            an engine folder that holds files which its manifest does not list.
        sign_key: file of the private key to sign the folder with, see ``export.signing``.

    Raises:
        BackendError: the backend is not installed.
        InputError: ``folder`` holds something else, or cannot be written, or the image size is
            not one that the model can have, or the key cannot be read.
        EngineError: a graph does not agree with torch.
        DeviceMemoryError: out of memory.
    """
    version = backend_version(target.backend)
    check_buildable(target)
    specs = source.specs(target.height, target.width, target.batch_range)
    target.graphs_of(specs)
    sign = Signer(sign_key) if sign_key is not None else None
    # of a link what it points to is replaced, not the link
    folder = Path(os.path.realpath(folder))
    _check_target(folder, force)
    check_resources(source, target, folder)
    parts = key_parts(source.weights_hash, target)
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
        source.tokenizer.save_pretrained(partial / "tokenizer")
        graphs = _build_all(source, specs, partial, target, progress or _no_progress)
        manifest = Manifest(
            target=target,
            backend_version=version,
            torch_version=torch.__version__,
            opset=OPSET,
            info=source.info,
            weights_hash=source.weights_hash,
            key=key_of(parts),
            key_parts=parts,
            graphs=graphs,
            files=hash_folder(partial, {g.file: g.sha256 for g in graphs.values()}),
        ).sealed(sign)
        (partial / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
        partial.chmod(0o755)  # mkdtemp makes it private
        sync_folder(partial)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class _Checked:
    """A graph as ONNX, compared with torch."""

    file: Path
    parity: float
    tolerance: float
    seconds: float


def _build_all(
    source: ModelSource,
    specs: dict[GraphName, IOSpec],
    folder: Path,
    target: Target,
    progress: Progress,
) -> dict[GraphName, GraphRecord]:
    """All graphs. TensorRT compiles one in the background while others are exported."""
    weights_of = graph_weights(source, target)
    names = target.graphs_of(specs)
    heavy = [name for name in names if weights_of[name] > MANY_WEIGHTS]
    pending: dict[GraphName, Future[GraphRecord]] = {}
    # a thread begins on the first GPU, whatever the caller's is
    card = torch.cuda.current_device() if torch.cuda.is_available() else -1
    compiler = ThreadPoolExecutor(1, "hcma-fast-compile", torch.cuda.set_device, (card,))
    try:
        with WeightsFile(folder) as weights:
            for name in in_turns(names, heavy):
                for other in pending.values():
                    # two heavy ones do not fit in memory together; and a failure ends the build
                    if name in heavy or other.done():
                        other.result()
                checked = _export_one(source, specs[name], folder, weights, target, progress)
                _free_memory()
                pending[name] = compiler.submit(
                    _compile_one, checked, specs[name], target, progress
                )
            done = {name: future.result() for name, future in pending.items()}
    finally:
        compiler.shutdown(cancel_futures=True)
    records = {name: done[name] for name in names}
    if target.native and not target.strip_weights:
        # the engines hold their weights themselves
        for file in [*folder.glob("*.onnx"), folder / WEIGHTS_FILE]:
            file.unlink()
    return records


def in_turns(names: Sequence[GraphName], heavy: Sequence[GraphName]) -> list[GraphName]:
    """The heavy graphs, a share of the others after each: work while it is compiled."""
    light = [name for name in names if name not in heavy]
    share = -(-len(light) // max(1, len(heavy)))
    order = []
    for number, name in enumerate(heavy):
        order += [name, *light[number * share : (number + 1) * share]]
    return order or light


def _export_one(
    source: ModelSource,
    spec: IOSpec,
    folder: Path,
    weights: WeightsFile,
    target: Target,
    progress: Progress,
) -> _Checked:
    """One graph. What the next stage does not need is freed first: it may be gigabytes."""
    started, name = time.monotonic(), spec.graph
    vocabulary = len(source.tokenizer)
    progress(name, "compile" if target.backend == "torch-compile" else "export")
    module = graph_of(source, name, target.height, target.width)
    cases = cases_for(spec, module)
    expected = references(spec, module, vocabulary=vocabulary, cases=cases)
    # OpenVINO takes float32 graphs, and rounds by itself
    exported: Precision = "float32" if target.backend == "openvino" else target.precision
    module = at_precision(name, module, exported)
    file = export_graph(spec, module, folder, weights, target, vocabulary=vocabulary)
    del module
    _free_memory()
    progress(name, "validate")
    error = compare(spec, expected, open_graph(file, spec, target))
    tolerance = TOLERANCES[graph_precision(name, target.precision)]
    if not error <= tolerance:
        raise EngineError(
            f"the compiled graph {name} does not agree with torch",
            value=f"relative error {error:.2e}, tolerance {tolerance:.0e}",
            remedy="This is a fault of the export: report it, with hcma-fast doctor.",
        )
    return _Checked(file, error, tolerance, time.monotonic() - started)


def _compile_one(
    checked: _Checked, spec: IOSpec, target: Target, progress: Progress
) -> GraphRecord:
    started = time.monotonic()
    if target.backend in TRT_LIBRARIES:
        progress(spec.graph, "compile")
    engine, report = compile_engine(checked.file, spec, target)
    record = GraphRecord(
        file=engine.name,
        sha256=hash_file(engine),
        size_bytes=engine.stat().st_size,
        spec=spec,
        # TensorRT, that of ONNX Runtime too, makes the engine that runs out of what was compared
        checked="engine" if engine == checked.file and "tensorrt" not in target.backend else "onnx",
        parity=checked.parity,
        tolerance=checked.tolerance,
        seconds=round(checked.seconds + time.monotonic() - started, 2),
        engine=report,
    )
    progress(spec.graph, "done")
    return record


def _free_memory() -> None:
    """Give back to the system what is no longer used, for libraries that allocate by themselves.

    glibc keeps what it once had: at full size 5 GB of a session that is closed.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _check_target(folder: Path, force: bool) -> None:
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    engine_files(folder)
    if not force:
        raise InputError(
            "there is an engine in this folder already",
            value=str(folder),
            remedy="Add --force to replace it.",
        )


def _put_in_place(partial: Path, folder: Path) -> None:
    """Give ``partial`` the name ``folder``; of what has it, only an engine's files are deleted."""
    if not folder.exists():
        partial.rename(folder)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(retired / RETIRED)
    partial.rename(folder)
    try:
        remove_engine(retired)
    except HcmaError as error:
        # something was put into the folder while the engine was built
        _log.warning("The engine that was replaced is left in %s: %s", retired, error)


def _no_progress(graph: str, stage: str) -> None:
    """Nobody watches."""
