"""Real TensorRT-RTX builds of small graphs, with no GPU; and every way in which one can fail."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hcma_fast.errors import BackendError, DeviceMemoryError, EngineError, UsageError
from hcma_fast.export.backends.trt import build as trt_engine
from hcma_fast.export.backends.trt.build import (
    ARCHITECTURES,
    TRTLibrary,
    TRTOptions,
    TRTReport,
    build_trt,
    check_architectures,
    trt_log,
)
from hcma_fast.export.backends.trt.engine import load_engine
from hcma_fast.specs import BatchRange, IOSpec, TensorSpec

WIDTH = 64
SPEC = IOSpec(
    "vae_decoder",
    (TensorSpec("z", ("batch", WIDTH)), TensorSpec("scale", (2,))),
    (TensorSpec("image", ("batch", WIDTH)),),
    BatchRange(1, 2, 4),
)
SM89 = TRTOptions("tensorrt-rtx", ("sm89",))

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="no tensorrt_rtx")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def save(path: Path, nodes: list[Any], *, batch: str | int = "batch", **storage: Any) -> Path:
    """``nodes`` over z, scale and a weight w, in float32 at the ends, as an ONNX file."""
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype("float32")
    z, scale, image = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("z", (batch, WIDTH)), ("scale", (2,)), ("image", (batch, WIDTH)))
    )
    stored = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([0]), "first")]
    graph = helper.make_graph(nodes, "graph", [z, scale], [image], stored)
    opset = [helper.make_opsetid("", 23)]
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=11), path, **storage)
    return path


def linear() -> list[Any]:
    """image = gelu(z w) * scale[0]"""
    return [
        helper.make_node("MatMul", ["z", "w"], ["product"], "product"),
        helper.make_node("Gelu", ["product"], ["active"], "active"),
        helper.make_node("Gather", ["scale", "first"], ["factor"], "factor"),
        helper.make_node("Mul", ["active", "factor"], ["image"], "image"),
    ]


def half() -> list[Any]:
    """The same, its product in float16."""
    return [
        helper.make_node("Cast", ["z"], ["z16"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["w"], ["w16"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["z16", "w16"], ["p16"]),
        helper.make_node("Cast", ["p16"], ["product"], to=TensorProto.FLOAT),
        *linear()[1:],
    ]


def attention() -> list[Any]:
    """image = gelu(attention over 4 heads of z, its keys and values) * scale[0]"""
    return [
        helper.make_node("Constant", [], ["split"], value_ints=[0, 4, 2, 8]),
        helper.make_node("Constant", [], ["join"], value_ints=[-1, WIDTH]),
        helper.make_node("Reshape", ["z", "split"], ["heads"]),
        # one tensor as query, key and value would crash TensorRT-RTX 1.7.1; no graph of ours does
        helper.make_node("Neg", ["heads"], ["keys"]),
        helper.make_node("Exp", ["heads"], ["values"]),
        helper.make_node("Attention", ["heads", "keys", "values"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "join"], ["product"]),
        *linear()[1:],
    ]


def built(path: Path, report: TRTReport) -> None:
    """The file is whole: the library reads through all of it, and then wants a driver."""
    assert path.stat().st_size == report.size_bytes
    assert [p.name for p in path.parent.iterdir() if ".part" in p.name] == []
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no NVIDIA GPU"):
            load_engine(path, "tensorrt-rtx")


@needs_rtx
def test_builds_a_dynamic_batch_and_says_what_it_saw(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "linear.engine"
    with caplog.at_level(logging.DEBUG, "hcma_fast"):
        report = build_trt(save(tmp_path / "linear.onnx", linear()), SPEC, path, SM89)
    built(path, report)
    assert report.library == "tensorrt-rtx"
    assert report.version == trt_engine.trt_version("tensorrt-rtx")
    assert report.architectures == ("sm89",)
    assert not report.stripped
    assert report.network_product_dtypes == {"float32": 1}
    assert report.network_dtypes["float32"] >= 4
    assert sum(report.network_dtypes.values()) == report.network_layers
    assert report.size_bytes > 4 * WIDTH**2
    assert report.user_allocation
    # what the compiler of TensorRT-RTX 1.7.1 noted in the engine
    assert b"stream_capturable=1" in path.read_bytes()
    assert TRTReport.model_validate_json(report.model_dump_json()) == report
    # the library's log is ours, and its stream is not the user's data
    assert any("tensorrt-rtx: " in record.getMessage() for record in caplog.records)
    assert capfd.readouterr().out == ""


@needs_rtx
@pytest.mark.parametrize("batch", ["batch", 2])
def test_builds_one_batch_size(tmp_path: Path, batch: str | int) -> None:
    spec = IOSpec(SPEC.graph, SPEC.inputs, SPEC.outputs, BatchRange(2, 2, 2))
    path = tmp_path / "linear.engine"
    onnx_path = save(tmp_path / "linear.onnx", linear(), batch=batch)
    built(path, build_trt(onnx_path, spec, path, SM89))


@needs_rtx
def test_the_profile_holds_the_batch_range_and_fixed_shapes() -> None:
    builder = trt_engine.trt_module("tensorrt-rtx").Builder(trt_log("tensorrt-rtx"))
    profile = trt_engine._profile(builder, SPEC)
    shapes = {
        name: [tuple(shape) for shape in profile.get_shape(name)] for name in SPEC.input_names
    }
    assert shapes == {"z": [(1, WIDTH), (2, WIDTH), (4, WIDTH)], "scale": [(2,)] * 3}


@needs_rtx
@pytest.mark.parametrize(("nodes", "dtype"), [(half(), "float16"), (attention(), "float32")])
def test_precision_is_that_of_the_graph_and_attention_may_decompose(
    tmp_path: Path, nodes: list[Any], dtype: str
) -> None:
    # float32 attention has no fused kernel: TensorRT refuses it, unless told that it may decompose
    path = tmp_path / "graph.engine"
    report = build_trt(save(tmp_path / "graph.onnx", nodes), SPEC, path, SM89)
    built(path, report)
    assert report.network_product_dtypes == {dtype: 1}


@needs_rtx
def test_weights_beside_the_graph_are_found_and_missed(tmp_path: Path) -> None:
    storage = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0}
    onnx_path = save(tmp_path / "linear.onnx", linear(), **storage)
    assert onnx_path.stat().st_size < 4 * WIDTH**2 < (tmp_path / "w.data").stat().st_size
    path = tmp_path / "linear.engine"
    report = build_trt(onnx_path, SPEC, path, SM89)
    built(path, report)
    assert report.size_bytes > 4 * WIDTH**2
    path.unlink()
    (tmp_path / "w.data").unlink()
    with pytest.raises(EngineError, match="cannot read"):
        build_trt(onnx_path, SPEC, path, SM89)
    assert [p.name for p in tmp_path.iterdir()] == ["linear.onnx"]


@needs_rtx
def test_builds_for_two_gpus_with_every_option(tmp_path: Path) -> None:
    options = TRTOptions("tensorrt-rtx", ("sm86", "sm120"), 64, optimization_level=1, tf32=True)
    path = tmp_path / "linear.engine"
    report = build_trt(save(tmp_path / "linear.onnx", linear()), SPEC, path, options)
    built(path, report)
    assert report.architectures == ("sm86", "sm120")


@needs_rtx
def test_options_reach_the_library() -> None:
    trt = trt_engine.trt_module("tensorrt-rtx")
    options = TRTOptions("tensorrt-rtx", ("sm86", "sm120"), 64, True, optimization_level=1)
    config = trt.Builder(trt_log("tensorrt-rtx")).create_builder_config()
    trt_engine._configure(trt, config, options)
    count = config.num_compute_capabilities
    assert [config.get_compute_capability(i).name for i in range(count)] == ["SM86", "SM120"]
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 * 2**20
    assert config.builder_optimization_level == 1
    flags = {name for name, f in trt.BuilderFlag.__members__.items() if config.get_flag(f)}
    assert flags == {"STRIP_PLAN", "REFIT_IDENTICAL", "REQUIRE_USER_ALLOCATION"}
    trt_engine._configure(trt, config, TRTOptions("tensorrt-rtx"))
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == trt.ComputeCapability.CURRENT


@needs_rtx
@pytest.mark.parametrize("content", ["an unknown operator", "no ONNX"])
def test_a_graph_that_cannot_be_read_leaves_everything_as_it_was(
    tmp_path: Path, content: str
) -> None:
    onnx_path, path = tmp_path / "bad.onnx", tmp_path / "kept.engine"
    path.write_bytes(b"the old one")
    if content == "no ONNX":
        onnx_path.write_bytes(b"\xff" * 100)
    else:
        unknown = helper.make_node("Nonsense", ["product"], ["active"], "the_culprit")
        save(onnx_path, [linear()[0], unknown, *linear()[2:]])
    with pytest.raises(EngineError, match="cannot read") as caught:
        build_trt(onnx_path, SPEC, path, SM89)
    if content == "an unknown operator":
        assert "the_culprit" in str(caught.value)
        assert "Nonsense" in str(caught.value)
    assert path.read_bytes() == b"the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.onnx", "kept.engine"]


@needs_rtx
@pytest.mark.parametrize(
    ("batch", "gpu", "words"),
    [
        (2, "sm89", r"z is float32 \(2, 64\), not float32"),
        ("batch", "sm75", "FP32 GEMM is not supported"),
    ],
)
def test_another_signature_or_gpu_is_refused_in_clear_words(
    tmp_path: Path, batch: str | int, gpu: str, words: str
) -> None:
    onnx_path = save(tmp_path / "linear.onnx", linear(), batch=batch)
    with pytest.raises(EngineError, match=words):
        build_trt(onnx_path, SPEC, tmp_path / "a.engine", TRTOptions("tensorrt-rtx", (gpu,)))
    assert [p.name for p in tmp_path.iterdir()] == ["linear.onnx"]


@needs_rtx
@no_gpu
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (TRTOptions("tensorrt-rtx"), "--gpu-arch sm75, sm80"),
        (TRTOptions("tensorrt-rtx", ("sm89",), strip_weights=True), "leave the weights in"),
    ],
)
def test_what_needs_a_gpu_says_so(tmp_path: Path, options: TRTOptions, remedy: str) -> None:
    onnx_path = save(tmp_path / "linear.onnx", linear())
    with pytest.raises(BackendError, match="no NVIDIA GPU") as caught:
        build_trt(onnx_path, SPEC, tmp_path / "linear.engine", options)
    assert remedy in caught.value.remedy
    assert [p.name for p in tmp_path.iterdir()] == ["linear.onnx"]


@needs_rtx
def test_the_architectures_are_those_of_the_installed_library() -> None:
    members = trt_engine.trt_module("tensorrt-rtx").ComputeCapability.__members__
    ours = {name.upper() for name in ARCHITECTURES["tensorrt-rtx"]}
    assert ours == set(members) - {"NONE", "CURRENT"}
    check_architectures("tensorrt-rtx", ARCHITECTURES["tensorrt-rtx"])


@pytest.mark.parametrize(
    ("library", "names", "kind", "words"),
    [
        ("tensorrt-rtx", ["sm89", "ampere"], UsageError, "no architecture.*sm75, sm80"),
        ("tensorrt-rtx", ["SM89"], UsageError, "no architecture"),
        ("tensorrt-rtx", ["sm89", "sm80", "sm89"], UsageError, "named twice"),
        ("tensorrt-rtx", ["sm90"], BackendError, "sm90.*sm75, sm80.*use tensorrt"),
        ("tensorrt", ["sm90"], BackendError, "leave --gpu-arch out"),
        ("tensorrt", ["hopper"], UsageError, "leave --gpu-arch out"),
    ],
)
def test_architectures_are_checked(
    library: TRTLibrary, names: list[str], kind: type[Exception], words: str
) -> None:
    for check in (check_architectures, lambda _, n: TRTOptions(library, tuple(n))):
        with pytest.raises(kind, match=words):
            check(library, names)


@pytest.mark.parametrize(
    "wrong",
    [{"workspace_mib": 0}, {"optimization_level": 6}, {"timing_cache": Path("timing.cache")}],
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TRTOptions("tensorrt-rtx", **wrong)


@pytest.mark.parametrize(
    ("library", "module", "extra"),
    [("tensorrt", "tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx", "rtx")],
)
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: TRTLibrary, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for call in (
        lambda: trt_engine.trt_version(library),
        lambda: build_trt(tmp_path / "a.onnx", SPEC, tmp_path / "b", TRTOptions(library)),
    ):
        with pytest.raises(BackendError) as caught:
            call()
        assert f'pip install "hcma-fast[{extra}]"' in caught.value.remedy


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        # as TensorRT-RTX 1.7.1 wrote them, with an address-space limit and with no driver
        (["Error Code 1: Myelin", "Error Code 2: OutOfMemory (Requested 2042)"], DeviceMemoryError),
        (["Error Code 1: Cuda Runtime (In f at g.cpp:221 (cudaError 35: driver))"], BackendError),
        (["Error Code 1: Cuda Runtime (In f at g.cpp:221 (cudaError 350: other))"], EngineError),
        # what is wrong with the file comes first, and a missing driver may follow
        (["Error Code 1: Serialization", "Cuda Runtime (cudaError 35: driver)"], EngineError),
        (["Error Code 1: Myelin ([pass.cpp:337] FP32 GEMM)"], EngineError),
        ([], EngineError),
    ],
)
def test_what_the_library_says_becomes_a_typed_error(
    errors: list[str], kind: type[Exception]
) -> None:
    error = trt_engine.trt_failure("it failed", errors)
    assert type(error) is kind
    assert str(error).startswith("it failed: ")


@needs_rtx
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
@pytest.mark.parametrize("kept", [None, b"garbage" * 40])
def test_a_missing_or_damaged_timing_cache_is_begun_anew(
    tmp_path: Path, kept: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    # TensorRT-RTX keeps the interface of tensorrt, though its caches stay empty
    path = tmp_path / "timing.cache"
    if kept is not None:
        path.write_bytes(kept)
    builder = trt_engine.trt_module("tensorrt-rtx").Builder(trt_log("tensorrt-rtx"))
    config = builder.create_builder_config()
    assert trt_engine._load_timing_cache(config, None) is None
    cache = trt_engine._load_timing_cache(config, path)
    assert bytes(cache.serialize())
    assert config.get_timing_cache() is cache
    heard = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert bool(heard) == (kept is not None)


def test_a_timing_cache_of_another_gpu_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Config:
        """Refuses what is not empty, as tensorrt does with a cache of another device."""

        used: bytes | None = None

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if not cache:
                self.used = cache
            return not cache

    path = tmp_path / "timing.cache"
    path.write_bytes(b"of an H100")
    config = Config()
    assert trt_engine._load_timing_cache(config, path) == b""
    assert config.used == b""
    assert str(path) in caplog.text


@pytest.mark.gpu
def test_a_timing_cache_is_kept_and_used_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    onnx_path, cache = save(tmp_path / "linear.onnx", linear()), tmp_path / "timing.cache"
    options = TRTOptions("tensorrt", timing_cache=cache)
    build_trt(onnx_path, SPEC, tmp_path / "linear.engine", options)
    first = cache.read_bytes()
    build_trt(onnx_path, SPEC, tmp_path / "linear.engine", options)
    assert len(cache.read_bytes()) == len(first)
