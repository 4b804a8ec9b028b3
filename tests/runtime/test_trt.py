"""The TensorRT engine: what it checks and binds, here with a stand-in; its results on a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from hcma_fast.errors import BackendError, DeviceMemoryError, EngineError, InputError, UsageError
from hcma_fast.export.trt_engine import ARCHITECTURES, TRTLibrary, TRTOptions, build_trt, trt_module
from hcma_fast.runtime import trt as runtime
from hcma_fast.runtime.trt import TRTEngine
from hcma_fast.specs import BatchRange, IOSpec, TensorSpec

WIDTH = 256
SPEC = IOSpec(
    "align",
    (
        TensorSpec("z", ("batch", WIDTH)),
        TensorSpec("timestep", ("batch",), "int64"),
        TensorSpec("lambdas", (2,)),
    ),
    (TensorSpec("z_aligned", ("batch", WIDTH)), TensorSpec("loss", ("batch",))),
    BatchRange(1, 2, 4),
)
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="no tensorrt_rtx")
#: for results on a GPU, whose sums run in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_device": False}
WEIGHT = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype("float32") / 16


def expected(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the graph computes, in float64."""
    z = inputs["z"].cpu().double() @ torch.from_numpy(WEIGHT).double()
    z = z * inputs["lambdas"][0].cpu() + inputs["timestep"].cpu()[:, None]
    return {"z_aligned": z.float(), "loss": z.amax(1).float()}


def make_inputs(batch: int, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "z": torch.randn(batch, WIDTH, generator=generator).to(device),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator).to(device),
        "lambdas": torch.rand(2, generator=generator).to(device),
    }


def write_onnx(path: Path) -> Path:
    model = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23]>
        graph (float[batch, {WIDTH}] z, int64[batch] timestep, float[2] lambdas)
            => (float[batch, {WIDTH}] z_aligned, float[batch] loss) {{
            first = Constant <value_ints = [0]> ()
            last = Constant <value_ints = [1]> ()
            product = MatMul (z, w)
            factor = Gather (lambdas, first)
            scaled = Mul (product, factor)
            time = Cast <to = 1> (timestep)
            column = Unsqueeze (time, last)
            z_aligned = Add (scaled, column)
            loss = ReduceMax <keepdims = 0> (z_aligned, last)
        }}"""
    )
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    onnx.save_model(model, path)
    return path


@dataclass
class StandIn:
    """Engine, its context and runtime cache in one; computes on the CPU, through addresses only."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    high: int = 4
    stripped: int = -1
    stale_cache: bool = False
    fails: Exception | bool = False
    addresses: dict[str, int] = field(default_factory=dict)
    batch: int = 0
    stream: int = 0
    kernels: bytes = b""

    num_io_tensors = property(lambda self: len(self.shapes))

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.batch or -1 if size == -1 else size for size in self.shapes[name])

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(trt_module("tensorrt-rtx").DataType, self.dtypes[name])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        sizes = (1, 2, self.high)
        return [tuple(n if size == -1 else size for size in self.shapes[name]) for n in sizes]

    def get_engine_stat(self, stat: Any) -> int:
        return self.stripped

    def create_runtime_config(self, *_: object) -> StandIn:
        return self

    create_runtime_cache = set_runtime_cache = create_execution_context = create_runtime_config

    def deserialize(self, kernels: bytes) -> bool:
        if not self.stale_cache:
            self.kernels = kernels
        return not self.stale_cache

    def serialize(self) -> bytes:
        return self.kernels

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if -1 in self.shapes[name]:
            self.batch = shape[0]
        return len(shape) == len(self.shapes[name])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def _view(self, name: str) -> Tensor:
        shape = self.get_tensor_shape(name)
        kind = ctypes.c_int64 if self.dtypes[name] == "INT64" else ctypes.c_float
        memory = (kind * int(np.prod(shape))).from_address(self.addresses[name])
        return torch.from_numpy(np.ctypeslib.as_array(memory)).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        if isinstance(self.fails, Exception):
            raise self.fails
        self.stream = stream
        self.kernels += b"k"
        for name, tensor in expected({n: self._view(n) for n in SPEC.input_names}).items():
            self._view(name).copy_(tensor)
        return not self.fails


TENSORS = (*SPEC.inputs, *SPEC.outputs)
SHAPES = {t.name: tuple(-1 if size == "batch" else int(size) for size in t.shape) for t in TENSORS}
DTYPES = {name: "INT64" if name == "timestep" else "FLOAT" for name in SHAPES}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """What :func:`start` runs on: as if there were a GPU, whose memory is the CPU's."""
    pytest.importorskip("tensorrt_rtx")
    engine = StandIn(dict(SHAPES), dict(DTYPES))
    monkeypatch.setattr(runtime, "load_engine", lambda path, library: engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    return engine


def start(runtime_cache: Path | None = None) -> TRTEngine:
    engine = TRTEngine(Path("a.engine"), SPEC, "tensorrt-rtx", runtime_cache=runtime_cache)
    engine.device = torch.device("cpu")
    return engine


def test_a_call_gives_fresh_outputs_and_copies_only_what_is_scattered(stand_in: StandIn) -> None:
    engine = start()
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


def test_bound_buffers_are_read_and_written_in_place(stand_in: StandIn) -> None:
    engine = start()
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
    stand_in: StandIn, change: dict[str, Any], words: str
) -> None:
    engine = start()
    inputs = {name: t for name, t in {**make_inputs(2), **change}.items() if t is not None}
    with pytest.raises(InputError, match=words):
        engine(inputs)
    assert stand_in.addresses == {}


def test_buffers_that_cannot_be_bound_are_refused(stand_in: StandIn) -> None:
    engine = start()
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
    stand_in: StandIn, fails: Any, kind: type[Exception]
) -> None:
    engine = start()
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
        ("shapes", {**SHAPES, "z": (-1, WIDTH + 1)}, r"z is float32 \(-1, 257\), not float32"),
        ("shapes", {**SHAPES, "z": (-1, WIDTH, 1)}, "z is float32"),
        ("shapes", {**SHAPES, "z": (2, WIDTH)}, "z is float32"),
        ("dtypes", {**DTYPES, "timestep": "INT32"}, "timestep is int32"),
        ("shapes", {n: s for n, s in SHAPES.items() if n != "loss"}, "loss is missing"),
        ("shapes", {**SHAPES, "more": (1,)}, "more is not in the signature"),
        ("high", 3, "for other batch sizes than 1:2:4.*1 to 3"),
        ("stripped", 100, "without its weights"),
    ],
)
def test_an_engine_of_another_signature_is_refused(
    stand_in: StandIn, attribute: str, value: Any, words: str
) -> None:
    stand_in.dtypes["more"] = "FLOAT"
    setattr(stand_in, attribute, value)
    with pytest.raises(EngineError, match=words):
        start()


def _with_hash(kernels: bytes) -> bytes:
    return hashlib.sha256(kernels).digest() + kernels


@pytest.mark.parametrize("kept", ["whole", "stale", "damaged", "cut off", "empty"])
def test_the_runtime_cache_is_read_if_it_is_good_and_written_after_the_first_call(
    stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    path = tmp_path / "kernels"
    whole = _with_hash(b"old:")
    damaged = {"damaged": whole[:-1] + b"?", "cut off": whole[:20], "empty": b""}
    path.write_bytes(damaged.get(kept, whole))
    stand_in.stale_cache = kept == "stale"
    engine = start(path)
    assert stand_in.kernels == (b"old:" if kept == "whole" else b"")
    assert (str(path) in caplog.text) == (kept not in ("whole", "empty"))
    engine(make_inputs(1))
    compiled = b"old:k" if kept == "whole" else b"k"
    assert path.read_bytes() == _with_hash(compiled)
    engine(make_inputs(1))
    assert path.read_bytes() == _with_hash(compiled)
    engine.save_runtime_cache()
    assert path.read_bytes() == _with_hash(compiled + b"k")


def test_kernels_that_cannot_be_kept_do_not_stop_an_image(
    stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(tmp_path / "missing" / "kernels")
    engine(make_inputs(1))
    assert "are not kept" in caplog.text


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda data: data, BackendError),
        (lambda data: data[: len(data) // 2], EngineError),
        (lambda data: b"junk" * 100, EngineError),
        (lambda data: b"", EngineError),
        (None, EngineError),
    ],
)
def test_a_real_engine_wants_a_driver_and_a_damaged_one_is_found(
    tmp_path: Path, damage: Any, kind: type[Exception]
) -> None:
    path = tmp_path / "a.engine"
    build_trt(write_onnx(tmp_path / "a.onnx"), SPEC, path, TRTOptions("tensorrt-rtx", ("sm89",)))
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(kind) as caught:
        TRTEngine(path, SPEC, "tensorrt-rtx")
    assert str(path) in str(caught.value)
    assert ("driver" in caught.value.remedy) == (kind is BackendError)


def test_only_rtx_has_a_runtime_cache() -> None:
    with pytest.raises(UsageError, match="no runtime cache"):
        TRTEngine(Path("a"), SPEC, "tensorrt", runtime_cache=Path("b"))


def test_the_library_is_imported_only_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, hcma_fast.runtime.trt; print([m for m in sys.modules if 'tensorrt' in m])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="not installed"):
        TRTEngine(Path("a"), SPEC, "tensorrt")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def library(request: pytest.FixtureRequest) -> TRTLibrary:
    """Each library that is installed and runs on the GPU that is here."""
    name: TRTLibrary = request.param
    pytest.importorskip(name.replace("-", "_"))
    major, minor = torch.cuda.get_device_capability()
    if name == "tensorrt-rtx" and f"sm{major}{minor}" not in ARCHITECTURES[name]:
        pytest.skip("TensorRT-RTX does not run on this GPU")
    return name


@pytest.mark.gpu
def test_agrees_with_torch_in_calls_and_in_a_cuda_graph(
    tmp_path: Path, library: TRTLibrary
) -> None:
    path = tmp_path / "a.engine"
    build_trt(write_onnx(tmp_path / "a.onnx"), SPEC, path, TRTOptions(library))
    engine = TRTEngine(path, SPEC, library)
    for batch in (1, 4, 2):
        inputs = make_inputs(batch, "cuda", seed=batch)
        torch.testing.assert_close(engine(inputs), expected(inputs), **CLOSE)
    inputs, outputs = make_inputs(2, "cuda"), engine.allocate(2)
    engine.bind(inputs, outputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine.enqueue()  # TensorRT does its lazy work before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        engine.enqueue()
    [inputs[name].copy_(tensor) for name, tensor in make_inputs(2, seed=9).items()]
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(outputs, expected(inputs), **CLOSE)


@pytest.mark.gpu
def test_a_stripped_engine_is_smaller_and_is_refitted(tmp_path: Path, library: TRTLibrary) -> None:
    onnx_path = write_onnx(tmp_path / "a.onnx")
    whole, path = tmp_path / "whole.engine", tmp_path / "stripped.engine"
    full = build_trt(onnx_path, SPEC, whole, TRTOptions(library))
    stripped = build_trt(onnx_path, SPEC, path, TRTOptions(library, strip_weights=True))
    assert stripped.stripped
    assert stripped.size_bytes < full.size_bytes - WEIGHT.nbytes // 2
    with pytest.raises(EngineError, match="without its weights"):
        TRTEngine(path, SPEC, library)
    engine = TRTEngine(path, SPEC, library, weights_onnx=onnx_path)
    inputs = make_inputs(3, "cuda")
    torch.testing.assert_close(engine(inputs), expected(inputs), **CLOSE)
    with pytest.raises(EngineError, match="does not take these weights"):
        TRTEngine(whole, SPEC, library, weights_onnx=onnx_path)
