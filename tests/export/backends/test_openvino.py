"""The OpenVINO engine: torch's results, outputs of one's own, and no silent precision."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from hcma_fast.errors import BackendError, DeviceMemoryError, EngineError
from hcma_fast.export.backends.openvino import model as openvino_model
from hcma_fast.export.backends.openvino.engine import OpenVINOEngine, openvino_version
from hcma_fast.export.backends.openvino.model import open_model
from hcma_fast.export.onnx.export import export_onnx
from hcma_fast.export.onnx.file import OnnxFile
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.validate import TOLERANCES, measure
from hcma_fast.export.weights_file import WeightsFile
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.specs import GRAPH_NAMES, GraphName, IOSpec, TensorSpec

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def engine(random_engine: Path, random_components: Components) -> OpenVINOEngine:
    return OpenVINOEngine(
        random_engine / "grounding.onnx", random_components.specs()["grounding"], threads=1
    )


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_graph_equals_torch(
    random_engine: Path, random_components: Components, name: GraphName
) -> None:
    spec = random_components.specs()[name]
    engine = OpenVINOEngine(random_engine / f"{name}.onnx", spec)
    module = random_components.graphs()[name]
    vocabulary = len(random_components.tokenizer)
    assert measure(spec, module, engine, vocabulary=vocabulary) < TOLERANCES["float32"]


def test_the_gradient_equals_float64_autograd(
    random_engine: Path, random_components: Components
) -> None:
    spec = random_components.specs()["align"]
    inputs = random_inputs(spec, 2, torch.Generator().manual_seed(0))
    # a step so long that z - z_aligned is the gradient, with next to no rounding of z in it
    inputs["eta"] = torch.full((2,), 1e6)
    found = OpenVINOEngine(random_engine / "align.onnx", spec)(inputs)["z_aligned"]
    exact = copy.deepcopy(random_components.graphs()["align"]).double()
    expected = exact(*(inputs[name].double() for name in spec.input_names))[0]
    step = (inputs["z"].double() - expected).norm()
    assert float((found.double() - expected).norm() / step) < 1e-5


@pytest.mark.slow
def test_every_graph_of_tiny_equals_torch(tmp_path: Path) -> None:
    components = load_components("tiny")
    vocabulary = len(components.tokenizer)
    with WeightsFile(tmp_path) as weights:
        for name, module in components.graphs().items():
            spec, path = components.specs()[name], tmp_path / f"{name}.onnx"
            export_onnx(spec, module, path, weights, vocabulary=vocabulary)
            engine = OpenVINOEngine(path, spec)
            error = measure(spec, module, engine, vocabulary=vocabulary)
            assert error < TOLERANCES["float32"], name


def shared_weight(path: Path, size: int) -> tuple[Tensor, IOSpec]:
    """z @ W and z @ W.T, the weight once in the file: a forward and a backward product."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    z, image, other = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name in ("z", "image", "other")
    )
    nodes = [
        helper.make_node("MatMul", ["z", "W"], ["image"]),
        helper.make_node("Transpose", ["W"], ["T"], perm=[1, 0]),
        helper.make_node("MatMul", ["z", "T"], ["other"]),
    ]
    weights = [numpy_helper.from_array(weight.numpy(), "W")]
    graph = helper.make_graph(nodes, "shared", [z], [image, other], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    tensors = (TensorSpec(name, ("batch", size)) for name in ("z", "image", "other"))
    first, *outputs = tensors
    return weight, IOSpec("vae_decoder", (first,), tuple(outputs))


def test_a_square_weight_and_its_transpose_are_not_mixed_up(tmp_path: Path) -> None:
    weight, spec = shared_weight(tmp_path / "x.onnx", 16)
    z = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    found = OpenVINOEngine(tmp_path / "x.onnx", spec)({"z": z})
    torch.testing.assert_close(found["image"], z @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["other"], z @ weight.T, rtol=1e-5, atol=1e-5)


def sinusoids(path: Path, factors: Sequence[str]) -> IOSpec:
    """Sines and cosines of a timestep at four frequencies, as every UNet makes them."""
    frequencies = numpy_helper.from_array(np.float32([1, 0.7, 0.1, 1e-4]), "frequencies")
    one = numpy_helper.from_array(np.int64([1]), "one")
    nodes = [
        helper.make_node("Unsqueeze", ["timestep", "one"], ["column"]),
        helper.make_node("Cast", ["column"], ["steps"], to=TensorProto.FLOAT),
        helper.make_node("Mul", factors, ["angles"]),
        helper.make_node("Cos", ["angles"], ["image"]),
        helper.make_node("Sin", ["angles"], ["other"]),
    ]
    inputs = [helper.make_tensor_value_info("timestep", TensorProto.INT64, ["batch"])]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])
        for name in ("image", "other")
    ]
    graph = helper.make_graph(nodes, "sinusoids", inputs, outputs, [frequencies, one])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    given = TensorSpec("timestep", ("batch",), "int64")
    made = tuple(TensorSpec(name, ("batch", 4)) for name in ("image", "other"))
    return IOSpec("vae_decoder", (given,), made)


@pytest.mark.parametrize("factors", [("steps", "frequencies"), ("frequencies", "steps")])
def test_sinusoids_of_timesteps_are_looked_up(tmp_path: Path, factors: tuple[str, str]) -> None:
    """In bfloat16 their angles would be rounded: to the next multiple of 4 at 796."""
    import openvino

    spec = sinusoids(tmp_path / "x.onnx", factors)
    model = _read(tmp_path / "x.onnx")
    openvino_model.look_up_sinusoids(openvino, model)
    assert not {"Sin", "Cos"} & {node.get_type_name() for node in model.get_ops()}
    compiled = openvino_model.shared_core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    timestep = torch.tensor([0, 1, 796, 999])
    found = openvino_model.runner(compiled, spec, OnnxFile.open(tmp_path / "x.onnx"))(
        {"timestep": timestep}
    )
    angles = timestep[:, None].float() * torch.tensor([1, 0.7, 0.1, 1e-4])
    torch.testing.assert_close(found["image"], angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["other"], angles.sin(), rtol=0, atol=1e-6)


def test_sinusoids_that_would_be_rounded_are_refused(tmp_path: Path) -> None:
    import openvino

    sinusoids(tmp_path / "x.onnx", ("steps", "steps"))
    with pytest.raises(EngineError, match="round the angles"):
        openvino_model.look_up_sinusoids(openvino, _read(tmp_path / "x.onnx"))


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_graph_is_opened_in_bfloat16_without_sinusoids_or_in_float32(
    random_engine: Path, name: GraphName
) -> None:
    import openvino

    model = _read(random_engine / f"{name}.onnx")
    if openvino_model.precision_of(name, "bfloat16") == "float32":
        assert name == "grounding"
        return
    openvino_model.look_up_sinusoids(openvino, model)
    assert not {"Sin", "Cos"} & {node.get_type_name() for node in model.get_ops()}


def _read(path: Path) -> Any:
    import openvino.frontend

    frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    return frontend.convert(frontend.load(str(path)))


def test_the_next_call_leaves_outputs_alone(
    engine: OpenVINOEngine, random_components: Components
) -> None:
    inputs = random_inputs(engine.spec, 2, torch.Generator().manual_seed(0))
    first = engine(inputs)
    kept = {name: value.clone() for name, value in first.items()}
    second = engine({**inputs, "boxes": inputs["boxes"] / 2})
    assert not torch.equal(second["regions"], kept["regions"])
    for name, value in kept.items():
        assert torch.equal(first[name], value)
        first[name].zero_()  # and may be written to
    assert torch.equal(engine(inputs)["regions"], kept["regions"])


def test_inputs_of_any_layout_and_entries_too_many(engine: OpenVINOEngine) -> None:
    inputs = random_inputs(engine.spec, 3, torch.Generator().manual_seed(0))
    expected = engine(inputs)
    boxes = inputs["boxes"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not boxes.is_contiguous()
    found = engine({**inputs, "boxes": boxes, "extra": torch.zeros(3)})
    for name, value in expected.items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("content", [b"not a graph", None], ids=["other", "missing"])
def test_a_file_that_is_no_graph(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"x\.onnx"):
        open_model(OnnxFile.open(tmp_path / "x.onnx"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert openvino_version().startswith("20")
    (tmp_path / "x.onnx").write_bytes(b"")  # an empty graph
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r'pip install "hcma-fast\[cpu\]"'):
        open_model(OnnxFile.open(tmp_path / "x.onnx"))
    with pytest.raises(BackendError):
        openvino_version()


class Lies:
    """OpenVINO on a CPU that claims bfloat16, or not, and then computes in ``actual``."""

    def __init__(self, real: Any, claimed: list[str], actual: str) -> None:
        self._real = real
        self.claimed, self.actual = claimed, actual

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Core(self) -> Any:
        return self

    def get_property(self, *key: str) -> Any:
        return getattr(self._real.Type, self.actual) if len(key) == 1 else self.claimed

    def compile_model(self, model: Any, device: str, options: dict[str, Any]) -> Any:
        assert options["INFERENCE_PRECISION_HINT"] == "bf16"
        return self


@pytest.mark.parametrize(
    ("claimed", "actual"), [(["FP32"], "bf16"), (["FP32", "BF16"], "f32")], ids=["cpu", "model"]
)
def test_bfloat16_is_refused_where_it_would_be_float32(
    monkeypatch: pytest.MonkeyPatch, random_engine: Path, claimed: list[str], actual: str
) -> None:
    lies = Lies(openvino_model._openvino(), claimed, actual)
    monkeypatch.setattr(openvino_model, "_openvino", lambda: lies)
    with pytest.raises(BackendError, match="bfloat16"):
        open_model(OnnxFile.open(random_engine / "text_encoder.onnx"), precision="bfloat16")


_SIGNAL = """
import faulthandler, gc, os, signal, sys
from pathlib import Path
from hcma_fast.export.backends.openvino.model import open_model
from hcma_fast.export.onnx.file import OnnxFile
faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *_: print("heard", flush=True))
source = OnnxFile.open(Path(sys.argv[1]))
first, second = (open_model(source) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX signals")
def test_a_signal_is_heard_after_engines_are_gone(random_engine: Path) -> None:
    """OpenVINO's stack for signals must not be one that it has given back."""
    done = subprocess.run(
        [sys.executable, "-c", _SIGNAL, random_engine / "grounding.onnx"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_bfloat16_is_real_or_refused(random_engine: Path, random_components: Components) -> None:
    import openvino

    path, spec = random_engine / "unet_plain.onnx", random_components.specs()["unet_plain"]
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendError, match="bfloat16"):
            OpenVINOEngine(path, spec, precision="bfloat16")
        return
    inputs = random_inputs(spec, 2, torch.Generator().manual_seed(0))
    half = OpenVINOEngine(path, spec, precision="bfloat16")(inputs)["noise_pred"]
    full = OpenVINOEngine(path, spec)(inputs)["noise_pred"]
    assert 1e-5 < float((half - full).norm() / full.norm()) < 0.1


@pytest.mark.parametrize("message", ["Exception from x:\nstd::bad_alloc", "other"])
def test_out_of_memory_is_typed_and_the_rest_is_not_hidden(
    random_engine: Path,
    random_components: Components,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
) -> None:
    spec = random_components.specs()["grounding"]
    engine = OpenVINOEngine(random_engine / "grounding.onnx", spec)

    def fail(*args: object) -> None:
        raise RuntimeError(message)

    engine._run = fail  # type: ignore[assignment]
    with pytest.raises(DeviceMemoryError if "alloc" in message else RuntimeError):
        engine({})
    monkeypatch.setattr(openvino_model, "_part_shared_weights", fail)
    with pytest.raises(DeviceMemoryError if "alloc" in message else EngineError):
        open_model(OnnxFile.open(random_engine / "grounding.onnx"))


def test_weights_in_a_file_beside_the_graph(
    tmp_path: Path, random_engine: Path, random_components: Components
) -> None:
    spec = random_components.specs()["grounding"]
    model = onnx.load(random_engine / "grounding.onnx")
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="w.bin")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("g.onnx", "w.bin"):
        shutil.move(tmp_path / name, moved)
    engine = OpenVINOEngine(moved / "g.onnx", spec)
    module = random_components.graphs()["grounding"]
    vocabulary = len(random_components.tokenizer)
    assert measure(spec, module, engine, vocabulary=vocabulary) < TOLERANCES["float32"]
    (moved / "w.bin").unlink()
    with pytest.raises(EngineError, match=r"w\.bin"):
        OpenVINOEngine(moved / "g.onnx", spec)
