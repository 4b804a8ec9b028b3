"""The machine and its clocks: read right after what was timed, of the GPU that did it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hcma_fast.bench.shared.clocks import Clocks, query_gpu, read_clocks
from hcma_fast.bench.shared.machine import Machine, commit_of_copy, describe_machine
from hcma_fast.bench.speed.harness import workers
from hcma_fast.bench.speed.harness.workers import Contestant

SMI = """#!/bin/sh
echo "$@" >> "{log}"
case "$1" in
  --id=GPU-none) echo "No devices were found"; exit 6 ;;
esac
case "$2" in
  *name*) echo "A card, 570.1" ;;
  *) echo "1980, 2100, [N/A], 450.00" ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi of one GPU; the file has what it was called with."""
    log, program = tmp_path / "log", tmp_path / "nvidia-smi"
    program.write_text(SMI.format(log=log))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return log


def test_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.cpu and machine.cores >= 1 and machine.memory_gib > 0
    assert machine.versions["torch"] == torch.__version__
    assert machine.clocks.load_average is not None
    assert machine.cpu in machine.line() and str(machine.commit) in machine.line()
    assert "load_average" in machine.line()
    # an older report has no clocks, and one whose rows have them none of its own
    old = machine.model_dump(exclude={"gpu", "driver", "clocks"})
    assert Machine.model_validate(old).clocks == Clocks()
    bare = describe_machine(clocks=False)
    assert bare.clocks == Clocks() and "load_average" not in bare.line()


def test_clocks_of_a_gpu_are_its_own(smi: Path) -> None:
    found = read_clocks("GPU-7")
    assert (found.gpu_sm_mhz, found.gpu_max_sm_mhz, found.gpu_power_limit_w) == (1980, 2100, 450)
    assert found.gpu_memory_mhz is None  # [N/A]
    assert smi.read_text().startswith("--id=GPU-7 --query-gpu=clocks.sm,clocks.max.sm,")
    machine = describe_machine(clocks=False)
    assert (machine.gpu, machine.driver) == ("A card", "570.1")
    assert query_gpu(("clocks.sm",), "GPU-none") == {}


def test_without_a_gpu_at_work_nvidia_smi_is_not_asked(smi: Path) -> None:
    found = read_clocks()
    assert found.gpu_sm_mhz is None and found.load_average is not None
    assert not smi.exists()


def test_clocks_are_read_right_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def read(gpu: str | None = None) -> Clocks:
        events.append(f"clocks {gpu}")
        return Clocks(cpu_mhz=5.0)

    def contestant(device: str) -> Contestant:
        def generate() -> Any:
            events.append("run")
            return np.zeros(1, np.float32)

        def figures() -> dict[str, float]:
            events.append("figures")
            return {}

        return Contestant(generate, "p", "0", device, figures)

    class Event:
        def __init__(self, **options: bool) -> None:
            pass

        def record(self) -> None:
            events.append("record")

        def synchronize(self) -> None:
            events.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 7.0

    monkeypatch.setattr(workers, "read_clocks", read)
    assert workers._timed(contestant("cpu")).clocks.cpu_mhz == 5
    assert events == ["run", "clocks None", "figures"]
    events.clear()
    properties = SimpleNamespace(uuid="ab-cd")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**20)
    run = workers._cuda_timed(contestant("cuda:1"))
    assert (run.seconds, run.device_peak_mib, run.clocks.cpu_mhz) == (0.007, 1, 5)
    assert events == ["record", "run", "record", "wait", "clocks GPU-ab-cd", "figures"]


def test_the_commit_of_an_installed_copy_is_told(tmp_path: Path) -> None:
    checkout, package = tmp_path / "checkout", tmp_path / "site-packages" / "hcma_fast"
    for folder in (checkout / "hcma_fast", checkout / "bench", package / "bench"):
        folder.mkdir(parents=True)
    for name in ("hcma_fast/__init__.py", "bench/code.py"):
        (checkout / name).write_text(f'"""{name}"""\n')
    (package / "__init__.py").write_text('"""hcma_fast/__init__.py"""\n')
    (package / "bench" / "code.py").write_text('"""bench/code.py"""\n')
    assert commit_of_copy(package, checkout) is None
    assert commit_of_copy(package, tmp_path / "gone") is None
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "-A"), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *words], cwd=checkout, check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True)
    assert commit_of_copy(package, checkout) == head[:12]
    (package / "bench" / "code.py").write_text("edited = True\n")
    assert commit_of_copy(package, checkout) == f"{head[:12]}+changes"
