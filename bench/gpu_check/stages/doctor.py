"""What is installed, what the card is, and what it reaches at best."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from hcma_fast.bench.gpu_check.device import Device
from hcma_fast.bench.gpu_check.missing import missing_here
from hcma_fast.bench.gpu_check.worker import Case, Figures
from hcma_fast.bench.shared.machine import describe_machine
from hcma_fast.bench.shared.rates import matmul_rate


def cases(device: Device, *, small: bool, result: Path) -> list[Case]:
    """Doctor, machine, requirements that are not met, and two rates of the card."""
    dtypes = ("float32",) if small else ("bfloat16", "float16", "float32")
    return [
        Case("doctor", _doctor),
        Case("machine", partial(_machine, device)),
        Case("requirements", lambda: {"missing": missing_here()}),
        *(Case(f"matrix product, {name}", partial(_product, device, name)) for name in dtypes),
        Case("memory bandwidth", partial(_bandwidth, device, 2**22 if small else 2**30)),
    ]


def _doctor() -> Figures:
    command = [sys.executable, "-m", "hcma_fast.cli.app", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=40)
    return {"report": json.loads(done.stdout)}


def _machine(device: Device) -> Figures:
    return {"device": device.describe(), **describe_machine().model_dump(mode="json")}


def _product(device: Device, dtype: str) -> Figures:
    return {"tflops": matmul_rate(getattr(torch, dtype), device.place) / 1e12}


def _bandwidth(device: Device, count: int) -> Figures:
    """Bytes read and written by a copy that no cache holds."""
    source = torch.zeros(count, dtype=torch.float32, device=device.place)
    target = torch.empty_like(source)
    times = device.seconds(lambda: target.copy_(source), repeats=8)
    return {"gb_per_s": 2 * source.nbytes / min(times) / 1e9}
