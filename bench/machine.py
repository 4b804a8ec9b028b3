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

_PACKAGES = ("hcma-fast", "torch", "diffusers", "transformers", "onnxruntime", "numpy")


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


def describe_machine() -> Machine:
    """This machine, now."""
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
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
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
