"""What a figure was measured on: machine, its clocks, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

_PACKAGES = (
    *("hcma-fast", "torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu"),
    *("openvino", "tensorrt", "tensorrt-rtx-cu13", "triton", "numpy"),
)
_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_SMI = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


class Clocks(BaseModel):
    """What the machine may change of itself while it is measured; None where it cannot be read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu_governor: str | None = None
    cpu_mhz: float | None = None
    """of the first core, now"""
    load_average: float | None = None
    """processes that wanted to run, over the last minute: other work beside a measurement"""
    gpu_sm_mhz: float | None = None
    gpu_max_sm_mhz: float | None = None
    gpu_memory_mhz: float | None = None
    gpu_power_limit_w: float | None = None


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


def describe_machine() -> Machine:
    """This machine, now."""
    gpu = _nvidia_smi()
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
        clocks=Clocks(
            cpu_governor=_read(_CPUFREQ / "scaling_governor"),
            cpu_mhz=_cpu_mhz(),
            load_average=round(os.getloadavg()[0], 2),
            gpu_sm_mhz=_number(gpu.get("clocks.sm")),
            gpu_max_sm_mhz=_number(gpu.get("clocks.max.sm")),
            gpu_memory_mhz=_number(gpu.get("clocks.mem")),
            gpu_power_limit_w=_number(gpu.get("power.limit")),
        ),
    )


def _read(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text().strip()
    return None


def _number(text: str | None) -> float | None:
    with suppress(TypeError, ValueError):  # nvidia-smi writes [N/A]
        return float(text)  # type: ignore[arg-type]
    return None


def _cpu_mhz() -> float | None:
    """By cpufreq, or else, as in most virtual machines, by the kernel's own measure."""
    khz = _number(_read(_CPUFREQ / "scaling_cur_freq"))
    if khz is not None:
        return khz / 1e3
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    found = [line.partition(":")[2] for line in lines if line.startswith("cpu MHz")]
    return _number(found[0]) if found else None


def _nvidia_smi() -> dict[str, str]:
    """Of the first GPU; nothing where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        first = done.stdout.partition("\n")[0]
        return dict(zip(_SMI, [value.strip() for value in first.split(",")], strict=False))
    return {}


def _cpu_name() -> str:
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
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
