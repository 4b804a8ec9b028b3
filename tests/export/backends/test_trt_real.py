"""TensorRT as it is: a damaged engine is found here, and results are compared on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from hcma_fast.errors import BackendError, EngineError
from hcma_fast.export.backends.trt.build import ARCHITECTURES, TRTLibrary, TRTOptions, build_trt
from hcma_fast.export.backends.trt.engine import TRTEngine
from hcma_fast.export.build import build
from hcma_fast.export.target import Target
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.capture import CaptureMode
from hcma_fast.specs import BatchRange

from trt_graph import SPEC, WEIGHT, WIDTH, expected, make_inputs

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="no tensorrt_rtx")
#: for results on a GPU, whose sums run in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_device": False}


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
    engine = engine.fork()
    engine.bind(inputs, outputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine.enqueue()  # TensorRT does its lazy work before the capture
        engine.check_capturable()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        engine.enqueue()
    [inputs[name].copy_(tensor) for name, tensor in make_inputs(2, seed=9).items()]
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(outputs, expected(inputs), **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["step", "trajectory"])
@pytest.mark.parametrize("fuse", ["none", "step"])
def test_a_captured_pipeline_draws_the_same_picture(
    random_components: Components,
    tmp_path: Path,
    library: TRTLibrary,
    mode: CaptureMode,
    fuse: Literal["none", "step"],
) -> None:
    """Nobody has run this yet."""
    build(
        random_components,
        tmp_path / "engine",
        Target(library, batch=BatchRange(1, 1, 2), fuse=fuse),
    )
    pipe = HCMAPipeline.from_pretrained(tmp_path / "engine")
    runs: list[dict[str, Any]] = [{"seed": [1, 2]}, {"seed": [3, 4], "grounding_beta": 0.5}]
    given = {"num_inference_steps": 10, "output_type": "latent"}
    expected = [pipe(["ab", "c"], **run, **given).latents for run in runs]
    pipe.enable_cuda_graphs(mode)
    for run, latents in zip(runs, expected, strict=True):
        # captured, then replayed
        for _ in range(2):
            found = pipe(["ab", "c"], **run, **given).latents
            assert float((found - latents).norm() / latents.norm()) < 1e-3


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
