"""The rungs of the ladder, and the suite of the Triton kernels: what they would run, where."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from hcma_fast.bench.estimates.kernel_resources import CASES
from hcma_fast.bench.speed.harness.contestants import SD14
from hcma_fast.bench.speed.harness.plan import Plan
from hcma_fast.bench.speed.suites.kernel_times import kernels, load_kernel
from hcma_fast.bench.speed.suites.ladder import _gpu_rungs, ladder
from hcma_fast.bench.speed.suites.table import SUITES, check_suites
from hcma_fast.errors import BackendError


def test_a_ladder_climbs_on_the_backends_that_are_chosen() -> None:
    def rungs(*backends: str) -> list[str]:
        (group,) = ladder(Plan("tiny", backends=backends))
        return [case.name for case in group.cases][3:]

    rest = "text encoder, grounding and VAE too"
    for named in ("openvino", "openvino:bfloat16"):
        label = named.replace(":", " ")
        assert rungs(named) == [f"UNet on {label}", f"gradient on {label}", rest]
    assert rungs("eager", "onnxruntime") == ["UNet on onnxruntime", "gradient on onnxruntime", rest]
    assert rungs("onnxruntime", "openvino")[3:] == ["all graphs on openvino instead"]


@pytest.mark.parametrize("model", ["tiny", SD14])
def test_a_ladder_on_a_gpu_takes_nothing_back(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = ["tensorrt", "tensorrt-rtx", "torch-compile"]
    monkeypatch.setattr(
        "hcma_fast.bench.speed.harness.plan._native_backends", lambda device: compiled
    )
    monkeypatch.setattr("hcma_fast.bench.speed.suites.ladder.find_spec", lambda name: True)
    rungs = [ours for _, ours in _gpu_rungs(Plan(model, "cuda"))]
    names = [name for name, _ in _gpu_rungs(Plan(model, "cuda"))]
    assert len(set(names)) == len(names)
    for before, after in pairwise(rungs):
        if before.backend != after.backend:
            continue
        assert (before.grad_backend is None) >= (after.grad_backend is None)
        assert [None, "step", "trajectory"].index(before.cuda_graphs) <= [
            *(None, "step", "trajectory"),
        ].index(after.cuda_graphs)
        assert before.fuse <= after.fuse
    assert {ours.backend for ours in rungs} == {"eager", *compiled}
    assert any(ours.fuse for ours in rungs) == (model == SD14)
    for ours in rungs:
        ours.target(None, "cuda")  # can be built
    # on what is asked for, and quickly without engines, but with CUDA graphs
    some = [ours.backend for _, ours in _gpu_rungs(Plan(model, "cuda", ("torch-compile",)))]
    assert set(some) == {"eager", "torch-compile"}
    quick = [case.name for group in ladder(Plan(model, "cuda", quick=True)) for case in group.cases]
    assert any("CUDA graph" in name for name in quick)
    assert not any(backend in name for name in quick for backend in compiled)


@pytest.mark.parametrize(
    ("card", "libraries"),
    [((8, 9), ["tensorrt", "tensorrt-rtx"]), ((9, 0), ["tensorrt"]), ((10, 0), ["tensorrt"])],
)
def test_backends_of_a_gpu_are_those_that_can_build_for_it(
    card: tuple[int, int], libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX is installed with the tools, and builds for neither sm90 nor sm100."""

    def no_compiler(device: str) -> None:
        raise BackendError("no compiler", remedy="None.")

    monkeypatch.setattr("hcma_fast.export.backends.aoti.build.check_compiler", no_compiler)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: card)
    found = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr(
        "hcma_fast.bench.speed.harness.plan.find_spec", lambda name: name in found or None
    )
    plan = Plan("tiny", "cuda")
    assert [ours.label for ours in plan.chosen] == [
        *(label for name in libraries for label in (f"{name} float16", name)),
        "eager",
    ]
    # what stands for us in the large suites is what one would deploy
    assert [ours.label for ours in plan.leading] == [
        f"{libraries[0]} float16",
        f"{libraries[0]} float16, CUDA graphs",
    ]
    names = [case.name for case in SUITES["latency"][0](plan)[0].cases]
    assert len(set(names)) == len(names) and names[-1].endswith("CUDA graphs")
    (group, *_) = SUITES["throughput"][0](plan)
    names = [case.name for case in group.cases]
    assert names[1] == "plain loop in float16" and all("float16" in name for name in names[1:])
    without = SUITES["peers"][0](plan)[-1].cases
    assert without[-1].name == f"hcma-fast {libraries[0]}" and len(without) == 3
    # nothing that a build is for
    assert [case.name for group in SUITES["build"][0](plan) for case in group.cases]
    found.clear()
    assert [ours.label for ours in plan.leading] == ["eager", "eager, CUDA graphs"]
    assert SUITES["build"][0](plan) == []


def test_the_kernels_suite_needs_a_gpu() -> None:
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        check_suites(["kernels"], Plan("tiny"))
    groups = kernels(Plan("tiny", "cuda"))
    assert len(groups) == 2 * len(CASES)
    for group in groups:
        assert [case.name for case in group.cases] == ["torch", "Triton"]
        assert all(case.labels["bytes"] > 0 for case in group.cases)


@pytest.mark.parametrize("name", CASES)
def test_a_kernels_reference_runs_as_the_suite_runs_it(name: str) -> None:
    contestant = load_kernel(name, "float16", "torch", 2, "cpu")
    first = contestant.generate()
    assert np.isfinite(first).all() and np.abs(first).max() > 0
    np.testing.assert_array_equal(contestant.generate(), first)
