"""What a figure was measured on: machine, versions, commit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict

import hcma_fast
from hcma_fast.bench.shared.clocks import Clocks, query_gpu, read_clocks, read_text

# torch is imported where it is asked: every worker of a benchmark imports this module

_PACKAGES = (
    *("hcma-fast", "torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu"),
    *("openvino", "tensorrt", "tensorrt-rtx-cu13", "triton", "numpy"),
)
_FIRST_GPU = "0"
#: names that torch gives the instructions, on x86 and on ARM
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


class Machine(BaseModel):
    """Where and with what a benchmark ran."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cores: int
    """those that this process may use"""
    memory_gib: float
    torch_threads: int
    system: str
    python: str
    versions: dict[str, str | None]
    """None: not installed"""
    commit: str | None
    """of the checkout that the code is in or was installed from; ends in +changes where the code
    differs from it; None where there is none"""
    date: str
    gpu: str | None = None
    """the first one's name"""
    driver: str | None = None
    clocks: Clocks = Clocks()
    """at the end; empty where each row has its own"""

    def line(self) -> str:
        """For a reader."""
        clocks = {k: v for k, v in self.clocks.model_dump().items() if v is not None}
        parts = [
            f"{self.cpu}, {self.cores} cores ({self.torch_threads} torch threads), "
            f"{self.memory_gib} GiB",
            *([f"{self.gpu}, driver {self.driver}"] if self.gpu else []),
            f"Python {self.python}, "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items() if version),
            *([", ".join(f"{k} {v}" for k, v in clocks.items())] if clocks else []),
            f"commit {self.commit}",
            self.date,
        ]
        return "; ".join(parts)


def describe_machine(*, clocks: bool = True) -> Machine:
    """This machine.

    Args:
        clocks: read them too, now. False where each row has those of its own runs: a GPU that has
            nothing more to do says nothing of them.
    """
    import torch

    gpu = query_gpu(("name", "driver_version"), _FIRST_GPU)
    return Machine(
        cpu=_cpu_name(),
        cores=_usable_cores(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        torch_threads=torch.get_num_threads(),
        system=platform.platform(),
        python=platform.python_version(),
        # the wheel's metadata leaves out which build of torch it is (+cpu, +cu130)
        versions={name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        gpu=gpu.get("name"),
        driver=gpu.get("driver_version"),
        clocks=read_clocks(_FIRST_GPU) if clocks else Clocks(),
    )


def lacks_bfloat16() -> str | None:
    """Why bfloat16 on this CPU measures emulation; None where the CPU computes in it.

    torch computes in bfloat16 on any CPU, by conversion where there are no instructions for it.
    """
    import torch

    capabilities = torch.cpu.get_capabilities()
    if any(capabilities.get(name) for name in _BFLOAT16):
        return None
    return f"{_cpu_name()} has no instructions for bfloat16, so that it takes minutes a run"


def _cpu_name() -> str:
    lines = (read_text(Path("/proc/cpuinfo")) or "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int:
    # macOS has no affinity
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this code runs in, or that it was installed from as a copy."""
    code = Path(__file__).resolve()
    try:
        # an environment may lie inside of a checkout, of this project or another
        _git(code.parent, "ls-files", "--error-unmatch", code.name)
        changed = bool(_git(code.parent, "status", "--porcelain", "--untracked-files=no"))
        return _git(code.parent, "rev-parse", "--short=12", "HEAD") + (
            "+changes" if changed else ""
        )
    except (OSError, subprocess.SubprocessError):
        return _installed_commit(Path(hcma_fast.__file__).resolve().parent)


def _installed_commit(package: Path) -> str | None:
    """From what pip noted of the installation (PEP 610); None where that was no checkout."""
    try:
        noted = json.loads(metadata.distribution("hcma-fast").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    if commit := noted.get("vcs_info", {}).get("commit_id"):
        return str(commit)[:12]
    url = urlsplit(str(noted.get("url", "")))
    if url.scheme != "file" or "dir_info" not in noted:
        return None
    return commit_of_copy(package, Path(unquote(url.path)))


def commit_of_copy(package: Path, checkout: Path) -> str | None:
    """The commit of ``checkout``, ending in +changes if the copy has a source that is not in it.

    Returns:
        None: ``checkout`` is gone, or is none.
    """
    try:
        commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
        tree = _git(checkout, "ls-tree", "-r", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    known = {line.split()[2] for line in tree.splitlines()}
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        # git's name of a file's content
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        if blob.hexdigest() not in known:
            return f"{commit}+changes"
    return commit


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
