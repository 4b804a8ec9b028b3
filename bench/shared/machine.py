"""What a figure was measured on: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from hcma_fast.bench.shared.clocks import Clocks, query_gpu, read_clocks, read_text

_PACKAGES = (
    *("hcma-fast", "torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu"),
    *("openvino", "tensorrt", "tensorrt-rtx-cu13", "triton", "numpy"),
)
_FIRST_GPU = "0"


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
    """None outside a git checkout; ends in +changes when the checkout had any"""
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
    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
