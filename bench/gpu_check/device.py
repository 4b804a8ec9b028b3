"""What the stages ask of a device: clocks, capture, memory, counts of launches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch

from hcma_fast.export.precision import Precision
from hcma_fast.sampling.capture import Capture, CudaGraphs, no_capture

Run = Callable[[], object]
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")
_SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_COPIES = ("cudaMemcpy", "cuMemcpy")


class Device(Protocol):
    """Where the cases run. Tests have one that is not there."""

    kind: Literal["cpu", "cuda"]
    place: str
    """torch's name of it"""
    half: Precision

    def describe(self) -> dict[str, Any]:
        """What torch says of it."""

    def seconds(self, run: Run, repeats: int, warm_up: int = 2) -> list[float]:
        """Of each of ``repeats`` runs, after some that are not counted."""

    def calls(self, run: Run) -> dict[str, int]:
        """Launches, copies and waits of the host in one run, by the profiler."""

    def capture(self) -> Capture:
        """What captures functions of this device."""

    def peak_mib(self) -> float | None:
        """Most memory since :meth:`release`; None where nobody counts."""

    def release(self) -> None:
        """Give back what is no longer used."""


class CudaDevice:
    """torch's current NVIDIA GPU."""

    kind: Literal["cpu", "cuda"] = "cuda"
    place = "cuda"
    half: Precision = "float16"

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties()
        return {
            "name": found.name,
            "architecture": f"sm{found.major}{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def seconds(self, run: Run, repeats: int, warm_up: int = 2) -> list[float]:
        for _ in range(warm_up):
            run()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]

    def calls(self, run: Run) -> dict[str, int]:
        run()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        counts = {event.key: event.count for event in profile.key_averages()}

        def total(names: tuple[str, ...]) -> int:
            return sum(count for key, count in counts.items() if key.startswith(names))

        # one wait is our own, at the end
        waits = total(_SYNCS) - 1
        return {"launches": total(_LAUNCHES), "copies": total(_COPIES), "waits": waits}

    def capture(self) -> Capture:
        return CudaGraphs(torch.device("cuda", torch.cuda.current_device()))

    def peak_mib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**20

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class CpuDevice:
    """This machine's CPU: shows that the cases work, not how fast a GPU is."""

    kind: Literal["cpu", "cuda"] = "cpu"
    place = "cpu"
    half: Precision = "bfloat16"

    def describe(self) -> dict[str, Any]:
        return {"name": "cpu", "threads": torch.get_num_threads()}

    def seconds(self, run: Run, repeats: int, warm_up: int = 2) -> list[float]:
        for _ in range(min(warm_up, 1)):
            run()
        found = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
        return found

    def calls(self, run: Run) -> dict[str, int]:
        # a CPU launches nothing
        return {}

    def capture(self) -> Capture:
        return no_capture

    def peak_mib(self) -> float | None:
        return None

    def release(self) -> None:
        gc.collect()


def open_device(name: str) -> Device:
    """ "cuda" or "cpu"."""
    return CudaDevice() if name == "cuda" else CpuDevice()
