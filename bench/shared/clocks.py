"""What a machine may change of itself while something is measured: clocks, power, other work."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# no torch here: every worker imports this, and some need no torch

_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_GPU_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


class Clocks(BaseModel):
    """The state of the clocks at one moment; None where it cannot be read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu_governor: str | None = None
    cpu_mhz: float | None = None
    """of the first core"""
    load_average: float | None = None
    """processes that wanted to run, over the last minute: other work beside a measurement"""
    gpu_sm_mhz: float | None = None
    gpu_max_sm_mhz: float | None = None
    gpu_memory_mhz: float | None = None
    gpu_power_limit_w: float | None = None


def read_clocks(gpu: str | None = None) -> Clocks:
    """The clocks now. A GPU lowers its own as soon as it is idle, so ask right after the work.

    Args:
        gpu: index or UUID as nvidia-smi knows it; None where no GPU worked.
    """
    found = {} if gpu is None else query_gpu(_GPU_CLOCKS, gpu)
    return Clocks(
        cpu_governor=read_text(_CPUFREQ / "scaling_governor"),
        cpu_mhz=_cpu_mhz(),
        load_average=round(os.getloadavg()[0], 2),
        gpu_sm_mhz=_number(found.get("clocks.sm")),
        gpu_max_sm_mhz=_number(found.get("clocks.max.sm")),
        gpu_memory_mhz=_number(found.get("clocks.mem")),
        gpu_power_limit_w=_number(found.get("power.limit")),
    )


def query_gpu(names: tuple[str, ...], gpu: str) -> dict[str, str]:
    """What nvidia-smi says of a GPU, by name; nothing where there is no driver or no such GPU."""
    query = f"--query-gpu={','.join(names)}"
    command = ["nvidia-smi", f"--id={gpu}", query, "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        first = done.stdout.partition("\n")[0]
        return dict(zip(names, [value.strip() for value in first.split(",")], strict=False))
    return {}


def read_text(path: Path) -> str | None:
    """A small file of the system's; None where there is none."""
    with suppress(OSError):
        return path.read_text().strip()
    return None


def _number(text: str | None) -> float | None:
    with suppress(TypeError, ValueError):  # nvidia-smi writes [N/A]
        return float(text)  # type: ignore[arg-type]
    return None


def _cpu_mhz() -> float | None:
    """By cpufreq, or else, as in most virtual machines, by the kernel's own measure."""
    khz = _number(read_text(_CPUFREQ / "scaling_cur_freq"))
    if khz is not None:
        return khz / 1e3
    lines = (read_text(Path("/proc/cpuinfo")) or "").splitlines()
    found = [line.partition(":")[2] for line in lines if line.startswith("cpu MHz")]
    return _number(found[0]) if found else None
