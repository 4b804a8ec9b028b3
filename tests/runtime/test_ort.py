"""The ONNX Runtime engine: same results as torch, ignored extras, and typed memory errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.graphs import random_inputs
from hcma_fast.models.weights import Components
from hcma_fast.runtime.ort import OrtEngine


@torch.no_grad()
def test_runs_a_graph_and_ignores_what_it_does_not_name(
    random_engine: Path, random_components: Components
) -> None:
    spec = random_components.specs()["grounding"]
    engine = OrtEngine(random_engine / "grounding.onnx", spec)
    inputs = random_inputs(spec, 3, torch.Generator().manual_seed(0))
    # a view that is not contiguous, and an entry too many
    inputs["boxes"] = inputs["boxes"].transpose(0, 1).contiguous().transpose(0, 1)
    found = engine({**inputs, "timestep": torch.zeros(3)})
    module = random_components.graphs()["grounding"]
    expected = module(*(inputs[name] for name in spec.input_names))
    for name, reference in zip(spec.output_names, expected, strict=True):
        torch.testing.assert_close(found[name], reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("message", ["Failed to allocate memory for requested buffer", "other"])
def test_out_of_memory_is_typed_and_the_rest_is_not_hidden(
    random_engine: Path, random_components: Components, message: str
) -> None:
    spec = random_components.specs()["grounding"]
    engine = OrtEngine(random_engine / "grounding.onnx", spec)

    class RuntimeException(Exception):
        """As onnxruntime's own: not a RuntimeError."""

    def fail(inputs: object) -> dict[str, torch.Tensor]:
        raise RuntimeException(message)

    engine._run = fail
    with pytest.raises(DeviceMemoryError if "alloc" in message else RuntimeException):
        engine({})
