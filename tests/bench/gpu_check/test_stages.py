"""The stages' cases on a stand-in for a GPU, at small sizes; and all of them on this CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from hcma_fast.bench.estimates.gpus import PEERS
from hcma_fast.bench.gpu_check.device import CpuDevice, Run
from hcma_fast.bench.gpu_check.records import FAILED, OK, Check, StageRecord, load_check
from hcma_fast.bench.gpu_check.stages import unet
from hcma_fast.bench.gpu_check.worker import Case, Wrong, cases_of, run_cases
from hcma_fast.sampling.capture import Capture


class FakeGPU(CpuDevice):
    """Claims to be a GPU, and computes here: captures by calling again, counts one launch a run."""

    kind: Literal["cpu", "cuda"] = "cuda"

    def __init__(self) -> None:
        self.captured = 0

    def describe(self) -> dict[str, Any]:
        return {"name": "NVIDIA H200"}

    def calls(self, run: Run) -> dict[str, int]:
        run()
        return {"launches": 8, "copies": 0, "waits": 4}

    def capture(self) -> Capture:
        def capture(function: Callable[[], None], warm_up: Callable[[], None]) -> Run:  # type: ignore[type-arg]
            warm_up()
            self.captured += 1
            return function

        return capture  # type: ignore[return-value]

    def peak_mib(self) -> float:
        return 12.0


def run(stage: str, device: FakeGPU, tmp_path: Path, skip: tuple[str, ...] = ()) -> StageRecord:
    """A stage as its worker runs it, in this process."""
    record, lines = StageRecord(), []
    found = cases_of(stage, device, small=True, result=tmp_path / "result.json")
    run_cases(found, lambda entry: lines.append(json.dumps(entry)), device.release, done=skip)
    record.read_part(lines)
    return record


def test_an_error_ends_one_case_and_is_told() -> None:
    def wrong() -> dict[str, Any]:
        raise Wrong("not the same", {"error": 0.5})

    def broken() -> dict[str, Any]:
        raise RuntimeError("CUDA error: no kernel image is available")

    released: list[int] = []
    lines: list[dict[str, Any]] = []
    cases = [Case("wrong", wrong), Case("broken", broken), Case("fine", lambda: {"ms": 1.5})]
    run_cases(cases, lines.append, lambda: released.append(1), last=["wrong"])
    record = StageRecord()
    record.read_part([json.dumps(line) for line in lines])
    assert [line["begin"] for line in lines if "begin" in line] == ["broken", "fine", "wrong"]
    assert (record.state, len(released)) == (FAILED, 3)
    assert record.cases["fine"]["figures"] == {"ms": 1.5}
    assert record.cases["wrong"]["figures"] == {"error": 0.5}
    assert "no kernel image" in record.cases["broken"]["error"]
    assert any("broken" in line for line in record.cases["broken"]["trace"])


@pytest.mark.slow
def test_tiny_on_a_fake_gpu(tmp_path: Path) -> None:
    device = FakeGPU()
    record = run("tiny", device, tmp_path)
    assert record.state == OK, record
    assert device.captured == 3
    captured = record.cases["eager bfloat16, CUDA graph per step"]["figures"]
    assert captured["error_to_plain"] < 0.02 < captured["median_s"]
    assert 0 < captured["error_to_float32"] < 0.1
    # of four evaluations
    launches = record.cases["eager bfloat16, launches"]["figures"]
    assert launches == {"launches": 2, "copies": 0, "waits": 1, "evaluations": 4}


def test_the_unet_on_a_fake_gpu_and_its_floor(tmp_path: Path) -> None:
    device = FakeGPU()
    record = run("unet", device, tmp_path)
    # whatever kernels this CPU lacks: all others are timed
    failed = set(record.names(FAILED))
    assert failed <= {f"eager, batch 1, attention {name}" for name in ("cudnn", "efficient")}
    assert all(record.cases[name]["error"] for name in failed)
    figures = record.cases["eager, batch 2"]["figures"]
    assert (figures["batch"], figures["graph"], figures["peak_mib"]) == (2, "unet_grounded", 12)
    assert record.cases["eager, batch 1, CUDA graph"]["figures"]["error_to_eager"] < 1e-2

    check = Check("cuda", True, None, "now", stages={"unet": record})
    check.save(tmp_path / "result.json")
    floors = run("roofline", device, tmp_path)
    assert floors.state == OK, floors
    found = floors.cases["eager, batch 2"]["figures"]
    assert found["card"] == "H200 SXM 141 GB"
    assert 0 < found["floor_ms"] < found["practical_floor_ms"] < found["measured_ms"]
    assert 0 < found["share_of_peak"] < 0.01
    assert found["measured_ms"] == figures["median_ms"]
    assert set(floors.cases) == {
        *(name for name in record.names(OK) if name != "eager, batch 1, launches"),
        "published peers",
    }
    assert floors.cases["published peers"]["figures"]["rows"] == []
    assert not any(peer.gpu == "h200" for peer in PEERS)


def test_a_card_without_rates_is_said(tmp_path: Path) -> None:
    class Other(FakeGPU):
        def describe(self) -> dict[str, Any]:
            return {"name": "NVIDIA Unheard 1"}

    Check("cuda", True, None, "now").save(tmp_path / "result.json")
    record = run("roofline", Other(), tmp_path)
    assert record.state == FAILED
    assert "NVIDIA Unheard 1" in record.cases["published peers"]["error"]


@pytest.mark.slow
def test_images_on_a_fake_gpu(tmp_path: Path) -> None:
    device = FakeGPU()
    record = run("pipeline", device, tmp_path)
    assert record.state == OK, record
    figures = record.cases["3 steps, batch 2"]["figures"]
    assert figures["image_s"] == pytest.approx(figures["median_s"] / 2)
    assert (figures["captured"], device.captured > 0) == (True, True)
    assert record.cases["3 steps, batch 1, without graphs"]["figures"]["captured"] is False


def test_full_sizes_have_the_cases_of_the_docs(tmp_path: Path) -> None:
    """Nothing is run: what a card is asked at full size, in order of value."""
    names = {
        stage: [
            case.name
            for case in cases_of(stage, FakeGPU(), small=False, result=tmp_path / "none.json")
        ]
        for stage in ("doctor", "kernels", "tiny", "unet", "pipeline")
    }
    assert names["unet"][:2] == ["eager, batch 1", "eager, batch 8"]
    kernels = [f"eager, batch 1, attention {name}" for name in unet._KERNELS]
    assert set(kernels) < set(names["unet"])
    assert "torch-compile, batch 8" in names["unet"]
    assert names["pipeline"][:2] == ["15 steps, batch 1", "50 steps, batch 1"]
    assert {"15 steps, batch 16", "50 steps, batch 4"} < set(names["pipeline"])
    assert {f"denoise_update, {dtype}" for dtype in ("float16", "bfloat16", "float32")} < set(
        names["kernels"]
    )
    assert "torch-compile, CUDA graph per step" in names["tiny"]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_the_whole_check_on_this_cpu(tmp_path: Path) -> None:
    """Every stage for real, kernels by Triton's interpreter; a CPU has no floor to be beside."""
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "hcma_fast.bench.gpu_check", "--device", "cpu", "--small"]
    command += ["--out", str(out), "--budget", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = load_check(out)
    states = {name: stage.state for name, stage in found.stages.items()}
    assert {state for name, state in states.items() if name != "roofline"} == {OK}, done.stdout
    assert "published rates are not in" in str(found.stages["roofline"].cases)
    assert done.returncode == 1
    machine = found.stages["doctor"].cases["machine"]["figures"]
    assert machine["versions"]["torch"] == torch.__version__
    kernels = found.stages["kernels"].cases.values()
    assert all(case["figures"]["relative_error"] < 1e-4 for case in kernels)
