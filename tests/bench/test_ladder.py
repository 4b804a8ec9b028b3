"""The rungs of the ladder, and the suite of the Triton kernels: what they would run, where."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from hcma_fast.bench.contestants import SD14
from hcma_fast.bench.kernel_times import kernels, load_kernel
from hcma_fast.bench.kernels import CASES
from hcma_fast.bench.ladder import _gpu_rungs, ladder
from hcma_fast.bench.plan import Plan
from hcma_fast.bench.suites import check_suites
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
    monkeypatch.setattr("hcma_fast.bench.ladder.find_spec", lambda name: True)
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
    assert {ours.backend for ours in rungs} == {"eager", "tensorrt", "tensorrt-rtx"}
    assert any(ours.fuse for ours in rungs) == (model == SD14)
    for ours in rungs:
        ours.target(None, "cuda")  # can be built


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
