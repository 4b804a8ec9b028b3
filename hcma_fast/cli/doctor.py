"""``hcma-fast doctor``: what is installed, what runs here, and what to do about the rest.

Nothing heavy is imported: a broken torch must not break the command that says so.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict

from hcma_fast import __version__
from hcma_fast.cli.output import print_json
from hcma_fast.config import BACKENDS, cache_root

_PACKAGES = (
    *("torch", "diffusers", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
    *("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow", "pydantic"),
)
_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_TENSORRT_RTX = ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12")
#: what a backend runs on: any distribution of each group; the first group gives its version
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "eager": (("torch",), ("diffusers",), ("transformers",)),
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu"), ("torch",), ("onnx",), ("onnxscript",)),
    "onnxruntime-tensorrt": (("onnxruntime-gpu",), _TENSORRT, ("torch",), ("onnx",)),
    "openvino": (("openvino",), ("torch",)),
    "torch-compile": (("torch",),),
    "tensorrt": (_TENSORRT, ("torch",)),
    "tensorrt-rtx": (_TENSORRT_RTX, ("torch",)),
}
_EXTRAS = {
    "eager": "",
    "torch-compile": "",
    "onnxruntime-tensorrt": "[gpu,tensorrt]",
    "tensorrt": "[tensorrt]",
    "tensorrt-rtx": "[rtx]",
}
#: library -> its distributions, and the extra that brings it
_LIBRARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "triton": (("triton",), "gpu"),
}
#: in torch/version.py, which torch's build writes: cuda: Optional[str] = '13.0'
_TORCH_CUDA = re.compile(r"^cuda\b[^=\n]*= *'([^']+)'", re.MULTILINE)
_GPU_QUERY = "name,memory.total,driver_version,compute_cap"
_NVIDIA_SMI_TIMEOUT_S = 20
_MIB = 2**20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Found(_Frozen):
    """A backend or library: its version, or why it is missing and what brings it."""

    version: str | None
    problem: str | None = None
    remedy: str | None = None


class Cache(_Frozen):
    """The folder where engines are kept between runs."""

    folder: str
    exists: bool
    writable: bool
    engine_folders: int
    size_bytes: int


class Report(_Frozen):
    """All that ``doctor`` finds."""

    hcma_fast: str
    python: str
    platform: str
    cpu_count: int | None
    packages: dict[str, str | None]
    backends: dict[str, Found]
    libraries: dict[str, Found]
    conflicts: list[str]
    notes: list[str]
    torch_cuda: str | None
    """CUDA version that torch was built for; None without CUDA, or without torch"""
    gpus: list[str]
    """one line per NVIDIA GPU; empty when none was found"""
    cache: Cache


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show versions, backends (and why one is missing), the GPU and the engine cache."""
    report = examine()
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo("\n".join(_lines(report)))


def examine() -> Report:
    """Look at this machine; never fails for what it finds."""
    conflicts = []
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        conflicts.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them again."
        )
    gpus, torch_cuda = _gpus(), _torch_cuda()
    notes = ["The extra gpu excludes cpu and onnxruntime: install one of them."]
    if gpus and torch_cuda is None and _version("torch"):
        notes.append(
            "torch is built without CUDA and cannot use the GPU that is here: see docs/gpu.md, how "
            "to install."
        )
    return Report(
        hcma_fast=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpu_count=os.cpu_count(),
        packages={name: _version(name) for name in _PACKAGES},
        backends={name: _backend(name) for name in BACKENDS},
        libraries={name: _library(*entry) for name, entry in _LIBRARIES.items()},
        conflicts=conflicts,
        notes=notes,
        torch_cuda=torch_cuda,
        gpus=gpus,
        cache=_cache(),
    )


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _backend(name: str) -> Found:
    versions = {" or ".join(group): _version(*group) for group in _NEEDED[name]}
    missing = [group for group, version in versions.items() if version is None]
    if missing:
        extra = _EXTRAS.get(name, "[cpu]")
        return Found(
            version=None,
            problem=f"{', '.join(missing)} not installed",
            remedy=f'pip install "hcma-fast{extra}"',
        )
    if name == "torch-compile" and not any(
        map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))
    ):
        return Found(
            version=None, problem="no C++ compiler found", remedy="apt install g++, or set CXX"
        )
    return Found(version=next(iter(versions.values())))


def _library(distributions: tuple[str, ...], extra: str) -> Found:
    version = _version(*distributions)
    if version is None:
        return Found(
            version=None, problem="not installed", remedy=f'pip install "hcma-fast[{extra}]"'
        )
    return Found(version=version)


def _torch_cuda() -> str | None:
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    try:
        text = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = _TORCH_CUDA.search(text)
    return found[1] if found else None


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        # it is there without a driver or a device
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _cache() -> Cache:
    folder = cache_root()
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            # a build that runs beside us may take files away
            size += path.lstat().st_size if path.exists() else 0
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return Cache(
        folder=str(folder),
        exists=folder.is_dir(),
        writable=nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        engine_folders=sum(
            not path.parent.name.startswith(".") for path in folder.glob("*/manifest.json")
        ),
        size_bytes=size,
    )


def _lines(report: Report) -> list[str]:
    cache = report.cache
    built = f"for CUDA {report.torch_cuda}" if report.torch_cuda else "without CUDA"
    state = "writable" if cache.writable else "NOT WRITABLE: set HCMA_FAST_CACHE to another folder"
    return [
        f"hcma-fast {report.hcma_fast}",
        f"  python    {report.python}",
        f"  platform  {report.platform}, {report.cpu_count} CPUs",
        "",
        "packages",
        *(f"  {name:<16} {version or '-'}" for name, version in report.packages.items()),
        "",
        "backends",
        *(_line(name, found) for name, found in report.backends.items()),
        "",
        "other libraries (for an NVIDIA GPU: torch-compile there, CUDA graphs, kernels)",
        *(_line(name, found) for name, found in report.libraries.items()),
        "",
        "GPU",
        *(f"  {line}" for line in report.gpus or ["none found"]),
        *([f"  torch is built {built}"] if report.packages["torch"] else []),
        "",
        "engine cache",
        f"  {cache.folder}",
        f"  {cache.engine_folders} engine folders, {cache.size_bytes / _MIB:.1f} MiB, {state}",
        "",
        *(f"conflict: {text}" for text in report.conflicts),
        *(f"note: {text}" for text in report.notes),
    ]


def _line(name: str, found: Found) -> str:
    if found.version is not None:
        return f"  {name:<16} {found.version}"
    return f"  {name:<16} missing: {found.problem}. Remedy: {found.remedy}"
