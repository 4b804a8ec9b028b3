"""The validation of an export finds what it is there to find."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hcma_fast.errors import BackendError, EngineError
from hcma_fast.export.backends.onnxruntime import session as session_module
from hcma_fast.export.backends.onnxruntime.session import open_session
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.validate import TOLERANCES, measure
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import IOSpec, TensorSpec

SPEC = IOSpec("vae_decoder", (TensorSpec("z", ("batch", 3)),), (TensorSpec("image", ("batch", 3)),))


class Double(nn.Module):
    def forward(self, z: Tensor) -> tuple[Tensor]:
        return (2 * z,)


def run(change: Any) -> float:
    def runner(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"image": change(2 * inputs["z"])}

    return measure(SPEC, Double(), runner, vocabulary=10)


def test_equal_graphs_have_no_error() -> None:
    assert run(lambda image: image) == 0


def test_small_and_large_errors_are_measured() -> None:
    assert run(lambda image: image * 1.01) == pytest.approx(0.01, rel=1e-3)
    assert (
        run(lambda image: image + (torch.arange(len(image)) == 4)[:, None]) > TOLERANCES["float32"]
    )


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:, :2], lambda x: x.double(), lambda x: x[:1], lambda x: x / 0],
    ids=["shape", "dtype", "batch", "inf"],
)
def test_wrong_outputs_are_errors(change: Any) -> None:
    with pytest.raises(EngineError, match="vae_decoder gives image"):
        run(change)


def test_a_reference_that_is_not_finite_is_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> tuple[Tensor]:
            return (z * float("nan"),)

    with pytest.raises(EngineError, match="not finite"):
        measure(SPEC, Broken(), lambda inputs: {"image": inputs["z"]}, vocabulary=10)


@pytest.mark.parametrize("boxes", [0, 1, 30])
def test_random_inputs_follow_the_spec(random_components: Components, boxes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for spec in random_components.specs().values():
        inputs = random_inputs(spec, 2, generator, 200, boxes)
        for tensor in spec.inputs:
            value = inputs[tensor.name]
            assert tuple(value.shape) == tuple(2 if s == "batch" else s for s in tensor.shape)
            assert str(value.dtype) == f"torch.{tensor.dtype}"
        if "region_mask" in inputs:
            assert inputs["region_mask"].sum(-1).tolist() == [boxes, boxes]


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"x\.onnx"):
        open_session(tmp_path / "x.onnx")


def test_providers_are_never_replaced_silently(
    random_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = random_engine / "grounding.onnx"
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        open_session(graph, ["CUDAExecutionProvider"])
    real = session_module._onnxruntime()

    class Claims:
        """Says that it has CUDA, and falls back as the real one does."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def get_available_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(session_module, "_onnxruntime", Claims)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(BackendError):
        open_session(graph, ["CUDAExecutionProvider"])
