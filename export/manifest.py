"""manifest.json of an engine folder: what was built, from what, how well it agrees, and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcma_fast.config import devices_of
from hcma_fast.errors import EngineError, HcmaError
from hcma_fast.export.backends.trt.build import TRTReport
from hcma_fast.export.key import key_of
from hcma_fast.export.onnx.file import OnnxFile
from hcma_fast.export.signature import check_onnx_signature
from hcma_fast.export.signing import verify
from hcma_fast.export.target import Target, backend_version, machine
from hcma_fast.files import read_json
from hcma_fast.models.checkpoint.info import CheckpointInfo
from hcma_fast.models.checkpoint.json_files import first_line
from hcma_fast.opened import OpenedFile, private_folder
from hcma_fast.specs import BATCH, PLAN_COLUMNS, PLAN_ROWS, STEP_NAMES, GraphName, IOSpec

MANIFEST_FILE = "manifest.json"
FORMAT: Literal[3] = 3
_MAX_BYTES = 16 * 2**20
_NOT_HASHED = ("engine_hash", "signature")

_ONNX = ("onnxruntime", "onnxruntime-tensorrt", "openvino")
_SUFFIXES = {**dict.fromkeys(_ONNX, ".onnx"), "torch-compile": ".pt2"}


class FormatError(EngineError):
    """An engine folder of another version's format."""


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
    """All of manifest.json.

    ``files`` holds the sha256 of every other file, by relative path. ``engine_hash`` is that of
    everything here but itself and the signature, so it covers all files; :meth:`sealed` sets it.
    """

    format: Literal[3] = FORMAT
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
    engine_hash: str = ""
    signature: str | None = Field(None, description="see export.signing")

    def sealed(self, sign: Callable[[str], str] | None = None) -> Manifest:
        """The same with its hash and, by ``sign``, a signature of that."""
        digest = canonical_hash(self.model_dump(mode="json"))
        signature = sign(digest) if sign is not None else None
        return self.model_copy(update={"engine_hash": digest, "signature": signature})

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


def canonical_hash(values: Mapping[str, Any]) -> str:
    """The engine hash: sha256 of the manifest as canonical JSON, without hash and signature."""
    content = {key: value for key, value in values.items() if key not in _NOT_HASHED}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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


@dataclass(frozen=True)
class VerifiedFolder:
    """An engine folder with its files open, each read once and as the manifest says.

    Engines are opened from these files. Removing, replacing or rebuilding the folder changes
    nothing here, nor in the engines; writing into a file in place does.
    """

    path: Path
    """where the folder lay"""
    manifest: Manifest
    files: Mapping[str, OpenedFile]
    """all but the manifest, by relative path"""

    def onnx(self, name: str) -> OnnxFile:
        """The graph in the file ``name``, with its weights.

        Raises:
            EngineError: it is no graph, or takes weights from elsewhere than this folder.
        """
        return OnnxFile.of(
            self.files[name],
            lambda other: self.files.get(PurePosixPath(name).with_name(other).as_posix()),
        )

    def part(self, name: str) -> AbstractContextManager[Path]:
        """A temporary folder with the files of the sub-folder ``name``, for who reads folders."""
        start = f"{name}/"
        files = {
            file.removeprefix(start): opened
            for file, opened in self.files.items()
            if file.startswith(start)
        }
        return private_folder(files, origin=self.path / name)


def load_manifest(folder: Path, verify_key: Path | None = None) -> Manifest:
    """The manifest of :func:`open_folder`, for who does not open the engines."""
    return open_folder(folder, verify_key).manifest


def manifest_values(folder: Path) -> Any:
    """What ``folder``'s manifest.json holds, of any format, or of another program.

    Raises:
        InputError: it cannot be read, is no regular file, is too large, or is not JSON (see
            ``files.read_json``).
    """
    return read_json(folder / MANIFEST_FILE, "the manifest", limit=_MAX_BYTES)


def read_manifest(folder: Path, verify_key: Path | None = None) -> Manifest:
    """The manifest alone; the other files are not looked at.

    Args:
        verify_key: public key that must have signed it; None takes unsigned ones, too.

    Raises:
        EngineError: it is missing, not valid, of another format, changed since it was written, or
            not signed by the key.
        InputError, UsageError: the key cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        values = manifest_values(folder)
        _check_format(values, path)
        manifest = Manifest.model_validate(values)
    except EngineError:
        raise
    except (OSError, ValidationError, HcmaError) as error:
        raise _unusable(f"its manifest cannot be read: {first_line(error)}", path) from error
    if verify_key is not None:
        verify(verify_key, manifest.engine_hash, manifest.signature, str(folder))
    if canonical_hash(values) != manifest.engine_hash:
        raise _unusable("its manifest has changed since it was built", path)
    if key_of(manifest.key_parts) != manifest.key:
        raise _unusable("its manifest contradicts itself", "key")
    lost = _expected_graphs(manifest) ^ set(manifest.graphs)
    if lost:
        raise _unusable(f"its manifest lacks, or has too many: {', '.join(sorted(lost))}", path)
    for name, record in manifest.graphs.items():
        if record.spec.graph != name:
            raise _unusable("its manifest contradicts itself", name)
    return manifest


def _expected_graphs(manifest: Manifest) -> set[GraphName]:
    """The graphs of its target; `grounding` says which parts the model has."""
    expected = set(manifest.target.graph_names)
    grounding = manifest.graphs.get("grounding")
    if grounding is not None:
        there = grounding.spec.output_names
        expected -= {"align"} if "regions" not in there else set()
        expected -= {"unet_grounded"} if "grounding_context" not in there else set()
    return expected


def _check_format(values: object, path: Path) -> None:
    found = values.get("format") if isinstance(values, dict) else None
    if type(found) is int and found != FORMAT:
        age = "an older" if found < FORMAT else "a newer"
        problem = f"it was built by {age} version of hcma-fast"
        raise _unusable(problem, f"{path}: format {found}", FormatError)


def open_folder(folder: Path, verify_key: Path | None = None) -> VerifiedFolder:
    """Read manifest.json, and open every file and check it, before any of them is used.

    Args:
        verify_key: see :func:`read_manifest`.

    Raises:
        EngineError: the manifest is not usable, see :func:`read_manifest`; a file is missing,
            damaged, a link, or lies outside of the folder; a graph has other inputs or outputs than
            the manifest says.
        InputError, UsageError: the key cannot be read.
    """
    path = folder / MANIFEST_FILE
    manifest = read_manifest(folder, verify_key)
    for record in manifest.graphs.values():
        if manifest.files.get(record.file) != record.sha256:
            raise _unusable("its manifest contradicts itself", folder / record.file)
    for name in set(_names(folder)) - set(manifest.files):
        raise _unusable("it holds a file that its manifest does not name", folder / name)
    files = {name: _open_checked(folder, name, digest) for name, digest in manifest.files.items()}
    graphs = {record.file for record in manifest.graphs.values()}
    if any(not name.endswith(_SUFFIXES.get(manifest.backend, ".engine")) for name in graphs):
        raise _unusable("its graphs are not of its backend's kind", path)
    opened = VerifiedFolder(folder, manifest, files)
    # those that a stripped engine is refitted from, too
    for name in manifest.files:
        if name.endswith(".onnx"):
            _check_signature(manifest, name, opened.onnx(name).model())
    return opened


def _open_checked(folder: Path, name: str, expected: str) -> OpenedFile:
    file = folder / name
    if not is_inside(name) or _is_linked(folder, PurePosixPath(name)):
        raise _unusable("its manifest names a file outside of the folder, or a link", name)
    if not file.is_file():
        raise _unusable("a file is missing", file)
    try:
        opened = OpenedFile(file, follow=False)
        found = opened.sha256
    except OSError as error:
        raise _unusable(f"a file cannot be read ({error.strerror})", file) from error
    if found != expected:
        raise _unusable("a file has changed since it was built", file)
    return opened


def _check_signature(manifest: Manifest, name: str, model: onnx.ModelProto) -> None:
    """Of an ONNX graph; those of other kinds are compared when they are opened."""
    for record in manifest.graphs.values():
        if PurePosixPath(record.file).stem == PurePosixPath(name).stem:
            check_onnx_signature(record.spec, model)


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


def is_inside(name: str) -> bool:
    """Does this relative path stay inside of the folder that it is relative to?"""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _is_linked(folder: Path, inside: PurePosixPath) -> bool:
    return any((folder / part).is_symlink() for part in (inside, *inside.parents[:-1]))


def _unusable(problem: str, value: object, kind: type[EngineError] = EngineError) -> EngineError:
    return kind(
        f"this engine folder cannot be used: {problem}",
        value=str(value),
        remedy="Build it again: hcma-fast build --out FOLDER --force.",
    )
