"""The TensorRT engine: what it checks and binds, with a stand-in for the library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hcma_fast.errors import BackendError, DeviceMemoryError, EngineError, InputError, UsageError
from hcma_fast.export.backends.trt.engine import TRTEngine
from hcma_fast.specs import IOSpec

from trt_graph import WIDTH, expected, make_inputs

SPEC = IOSpec("align", (), ())


def test_a_call_gives_fresh_outputs_and_copies_only_what_is_scattered(stand_in: Any) -> None:
    engine = stand_in.start()
    kept = []
    for batch in (3, 1, 4):
        inputs = make_inputs(batch, seed=batch)
        scattered = inputs["z"].T.contiguous().T
        found = engine({**inputs, "z": scattered, "unknown": torch.zeros(1)})
        torch.testing.assert_close(found, expected(inputs))
        assert stand_in.addresses["timestep"] == inputs["timestep"].data_ptr()
        kept.append((found, expected(inputs)))
    # no later call wrote into an earlier one's outputs
    torch.testing.assert_close(*zip(*kept, strict=True))
    with pytest.raises(UsageError, match="no tensors are bound"):
        engine.enqueue()


def test_bound_buffers_are_read_and_written_in_place(stand_in: Any) -> None:
    engine = stand_in.start()
    inputs, outputs = make_inputs(2), engine.allocate(2)
    before = {name: tensor.data_ptr() for name, tensor in outputs.items()}
    engine.bind(inputs, outputs)
    for seed in (1, 2):
        [inputs[name].copy_(tensor) for name, tensor in make_inputs(2, seed=seed).items()]
        engine.enqueue()
        assert stand_in.stream == 5
        torch.testing.assert_close(outputs, expected(make_inputs(2, seed=seed)))
    engine.enqueue(SimpleNamespace(cuda_stream=9))  # type: ignore[arg-type]
    assert stand_in.stream == 9
    assert {name: tensor.data_ptr() for name, tensor in outputs.items()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"z": None}, "z is missing"),
        ({"z": torch.zeros(2, WIDTH, dtype=torch.float16)}, "float16"),
        ({"timestep": torch.zeros(2, dtype=torch.int32)}, "int32"),
        ({"timestep": torch.zeros(3, dtype=torch.int64)}, "timestep is not"),
        ({"z": torch.zeros(2, WIDTH + 1)}, "z is not"),
        ({"z": torch.zeros(WIDTH)}, "z is not"),
        ({"z": torch.zeros(5, WIDTH)}, "batch sizes 1-4"),
        ({"z": torch.zeros(0, WIDTH)}, "batch sizes 1-4"),
        ({"lambdas": torch.zeros(3)}, "lambdas is not"),
        ({"z": torch.zeros(2, WIDTH, device="meta")}, "on meta"),
    ],
)
def test_wrong_inputs_never_reach_the_library(
    stand_in: Any, change: dict[str, Any], words: str
) -> None:
    engine = stand_in.start()
    inputs = {name: t for name, t in {**make_inputs(2), **change}.items() if t is not None}
    with pytest.raises(InputError, match=words):
        engine(inputs)
    assert stand_in.addresses == {}


def test_buffers_that_cannot_be_bound_are_refused(stand_in: Any) -> None:
    engine = stand_in.start()
    inputs, outputs = make_inputs(2), engine.allocate(2)
    with pytest.raises(InputError, match="not contiguous"):
        engine.bind({**inputs, "z": inputs["z"].T.contiguous().T}, outputs)
    with pytest.raises(InputError, match="another batch size"):
        engine.bind(inputs, engine.allocate(3))
    with pytest.raises(InputError, match="loss is missing"):
        engine.bind(inputs, {"z_aligned": outputs["z_aligned"]})
    assert stand_in.addresses == {}
    # an output that the engine sizes in another way than the spec would be written past its end
    stand_in.shapes["loss"] = (8,)
    with pytest.raises(EngineError, match="refuses its tensors"):
        engine.bind(inputs, outputs)


@pytest.mark.parametrize(
    ("fails", "kind"),
    [
        (True, EngineError),
        (MemoryError(), DeviceMemoryError),
        (RuntimeError("cudaError 2: out of memory"), DeviceMemoryError),
        (TypeError("pybind11::init(): factory function returned nullptr"), EngineError),
        # a mistake of ours is not dressed up
        (TypeError("f() takes 1 argument"), TypeError),
    ],
)
def test_a_run_that_fails_is_typed_and_unbinds(
    stand_in: Any, fails: Any, kind: type[Exception]
) -> None:
    engine = stand_in.start()
    stand_in.fails = fails
    with pytest.raises(kind):
        engine(make_inputs(2))
    stand_in.fails = False
    with pytest.raises(UsageError):
        engine.enqueue()
    assert len(engine(make_inputs(2))) == 2


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("shapes", {"z": (-1, WIDTH + 1)}, r"z is float32 \(-1, 257\), not float32"),
        ("shapes", {"z": (-1, WIDTH, 1)}, "z is float32"),
        ("shapes", {"z": (2, WIDTH)}, "z is float32"),
        ("dtypes", {"timestep": "INT32"}, "timestep is int32"),
        ("shapes", {"loss": None}, "loss is missing"),
        ("shapes", {"more": (1,)}, "more is not in the signature"),
        ("high", 3, "for other batch sizes than 1:2:4.*1 to 3"),
        ("stripped", 100, "without its weights"),
    ],
)
def test_an_engine_of_another_signature_is_refused(
    stand_in: Any, attribute: str, value: Any, words: str
) -> None:
    stand_in.dtypes["more"] = "FLOAT"
    if isinstance(value, dict):
        changed = {**getattr(stand_in, attribute), **value}
        value = {name: entry for name, entry in changed.items() if entry is not None}
    setattr(stand_in, attribute, value)
    with pytest.raises(EngineError, match=words):
        stand_in.start()


def test_only_rtx_has_a_runtime_cache() -> None:
    with pytest.raises(UsageError, match="no runtime cache"):
        TRTEngine(Path("a"), SPEC, "tensorrt", runtime_cache=Path("b"))


def test_the_library_is_imported_only_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "hcma_fast.export.backends.trt.engine"
    code = f"import sys, {module}; print([m for m in sys.modules if 'tensorrt_rtx' in m])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="not installed"):
        TRTEngine(Path("a"), SPEC, "tensorrt")
