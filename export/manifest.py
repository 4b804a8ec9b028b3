"""manifest.json of an engine folder: what was built, from what, how well it agrees, and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcma_fast.config import devices_of
from hcma_fast.errors import EngineError, HcmaError
from hcma_fast.export.backends.trt.build import TRTReport
from hcma_fast.export.target import Target, backend_version, machine
from hcma_fast.export.weights_file import check_external_data
from hcma_fast.models.checkpoint.info import CheckpointInfo, first_line
from hcma_fast.specs import BATCH, PLAN_COLUMNS, PLAN_ROWS, STEP_NAMES, GraphName, IOSpec

MANIFEST_FILE = "manifest.json"
FORMAT: Literal[2] = 2


_ONNX = ("onnxruntime", "onnxruntime-tensorrt", "openvino")
_SUFFIXES = {**dict.fromkeys(_ONNX, ".onnx"), "torch-compile": ".pt2"}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GraphRecord(_Strict):
    """One graph: its file and how far its outputs lie from torch's in float32."""

    file: str
    sha256: str
    size_bytes: int = Field(ge=0)
    spec: IOSpec
    checked: Literal["engine", "onnx"] = Field(
        description="whose values were compared: the engine's own, or those of the ONNX graph that "
        "it was built from, where there is no GPU to run it; then it was parsed and built"
    )
    parity: float = Field(ge=0, description="largest relative error over all validation inputs")
    tolerance: float = Field(gt=0)
    seconds: float = Field(ge=0, description="export, compilation and validation")
    engine: TRTReport | None = Field(None, description="TensorRT's inspection of the network")


class Manifest(_Strict):
    """All of manifest.json. ``files`` holds the sha256 of every other file, by relative path."""

    format: Literal[2] = FORMAT
    target: Target
    backend_version: str
    torch_version: str
    opset: int
    info: CheckpointInfo
    weights_hash: str
    key: str
    key_parts: dict[str, str]
    graphs: dict[GraphName, GraphRecord]
    files: dict[str, str]

    @property
    def backend(self) -> str:
        """What runs the engines."""
        return self.target.backend

    @property
    def precision(self) -> str:
        """float32, float16 or bfloat16."""
        return self.target.precision

    @property
    def device(self) -> str:
        """Where the engines run, unless the caller says otherwise."""
        return "cuda" if self.target.device == "cuda" else devices_of(self.backend)[0]

    @property
    def engine_hash(self) -> str:
        """sha256 over names and contents of all files."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 of every file below ``folder`` but the manifest, by relative path.

    ``known`` has those that need not be read again.
    """
    given = known or {}
    return {name: given.get(name) or hash_file(folder / name) for name in _names(folder)}


def _names(folder: Path) -> list[str]:
    """Relative paths of all files below ``folder`` but the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    return [name for name in names if name != MANIFEST_FILE]


def load_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check every file against it, before any of them is used.

    Raises:
        EngineError: the manifest is missing or not valid; a file is missing, damaged, a link, or
            lies outside of the folder.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, HcmaError) as error:
        raise _unusable(f"its manifest cannot be read: {first_line(error)}", path) from error
    lost = set(manifest.target.graph_names) ^ set(manifest.graphs)
    if lost:
        raise _unusable(f"its manifest lacks, or has too many: {', '.join(sorted(lost))}", path)
    for record in manifest.graphs.values():
        if manifest.files.get(record.file) != record.sha256:
            raise _unusable("its manifest contradicts itself", folder / record.file)
    for name in set(_names(folder)) - set(manifest.files):
        raise _unusable("it holds a file that its manifest does not name", folder / name)
    for name, expected in manifest.files.items():
        inside = PurePosixPath(name)
        file = folder / name
        if inside.is_absolute() or ".." in inside.parts or _is_linked(folder, inside):
            raise _unusable("its manifest names a file outside of the folder, or a link", name)
        if not file.is_file():
            raise _unusable("a file is missing", file)
        if hash_file(file) != expected:
            raise _unusable("a file has changed since it was built", file)
    graphs = {record.file for record in manifest.graphs.values()}
    if any(not name.endswith(_SUFFIXES.get(manifest.backend, ".engine")) for name in graphs):
        raise _unusable("its graphs are not of its backend's kind", path)
    # those that a stripped engine is refitted from, too
    for name in manifest.files:
        if name.endswith(".onnx"):
            check_external_data(folder / name)
    return manifest


def check_usable(manifest: Manifest) -> None:
    """Can this machine run the engines, with what is installed?

    Raises:
        BackendError: the backend is not installed.
        EngineError: they were built with another version of it, or for another machine.
    """
    version = backend_version(manifest.backend)
    if version != manifest.backend_version:
        raise _unusable(f"it was built with {manifest.backend} {manifest.backend_version}", version)
    built_for = manifest.key_parts.get("machine", "an unknown machine")
    if manifest.backend == "torch-compile" and machine(manifest.target) != built_for:
        raise _unusable(f"it was built for {built_for}", machine(manifest.target))
    for name in STEP_NAMES:
        record = manifest.graphs.get(name)
        shapes = [tensor.shape for tensor in record.spec.inputs] if record else None
        if shapes is not None and (BATCH, PLAN_ROWS, PLAN_COLUMNS) not in shapes:
            raise _unusable("its step graphs were built by an older version", name)


def _is_linked(folder: Path, inside: PurePosixPath) -> bool:
    return any((folder / part).is_symlink() for part in (inside, *inside.parents[:-1]))


def _unusable(problem: str, value: object) -> EngineError:
    return EngineError(
        f"this engine folder cannot be used: {problem}",
        value=str(value),
        remedy="Build it again: hcma-fast build --out FOLDER --force.",
    )
