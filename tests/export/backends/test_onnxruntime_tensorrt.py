"""ONNX Runtime's TensorRT provider: asked for as it wants it, and refused where it falls back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.config import devices_of
from hcma_fast.errors import BackendError, EngineError
from hcma_fast.export.backends.onnxruntime.engine import OrtEngine
from hcma_fast.export.backends.onnxruntime.session import TENSORRT, open_session
from hcma_fast.export.build import build
from hcma_fast.export.open import verify
from hcma_fast.export.target import Target, default_precision
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import BatchRange


class FakeOrt:
    """As much of the module onnxruntime as a session takes; ``runs_on`` is what it ends up on."""

    __version__ = "1.32.0"

    def __init__(self, runs_on: tuple[str, ...], *, fails: str = "", writes: Path | None) -> None:
        self.runs_on, self.fails, self.writes = runs_on, fails, writes
        self.entries: dict[str, str] = {}
        self.asked: dict[str, Any] = {}

    def get_available_providers(self) -> list[str]:
        # what the build has, not what the machine can load
        return [*TENSORRT, "CUDAExecutionProvider", "CPUExecutionProvider"]

    def SessionOptions(self) -> Any:
        return SimpleNamespace(add_session_config_entry=self.entries.__setitem__)

    def InferenceSession(self, path: str, options: object, **asked: Any) -> Any:
        self.asked = asked
        if self.fails:
            raise RuntimeError(self.fails)
        if self.writes is not None:
            (self.writes / "a_sm89.engine").write_bytes(b"engine")
        return SimpleNamespace(get_providers=lambda: list(self.runs_on))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*runs_on: str, fails: str = "", writes: Path | None = None) -> FakeOrt:
        module = FakeOrt(runs_on, fails=fails, writes=writes)
        monkeypatch.setattr(
            "hcma_fast.export.backends.onnxruntime.session._onnxruntime", lambda: module
        )
        return module

    return install


def test_the_provider_gets_the_batch_range_and_the_caches(
    fake: Any, tmp_path: Path, random_components: Components
) -> None:
    module = fake(*TENSORRT, "CPUExecutionProvider", writes=tmp_path)
    spec = random_components.specs(batch=BatchRange(1, 2, 4))["grounding"]
    (tmp_path / "cut off.engine").write_bytes(b"e")
    OrtEngine(Path("a.onnx"), spec, device="cuda:1", tensorrt=tmp_path)
    assert module.asked["providers"] == list(TENSORRT)
    [options] = module.asked["provider_options"]
    assert options["device_id"] == "1"
    for kind in ("engine", "timing"):
        assert options[f"trt_{kind}_cache_enable"] == "1"
        assert options[f"trt_{kind}_cache_path"] == str(tmp_path)
    for kind, batch in (("min", 1), ("opt", 2), ("max", 4)):
        shapes = options[f"trt_profile_{kind}_shapes"].split(",")
        assert [shape.split(":")[0] for shape in shapes] == list(spec.input_names)
        assert f"boxes:{batch}x30x4" in shapes
    # nothing is left to the CPU, no file that nobody vouches for to TensorRT
    assert module.entries["session.disable_cpu_ep_fallback"] == "1"
    assert not (tmp_path / "cut off.engine").exists()
    OrtEngine(Path("a.onnx"), spec, device="cuda", tensorrt=tmp_path)
    assert (tmp_path / "a_sm89.engine").is_file()


def test_a_static_batch_needs_no_range(
    fake: Any, tmp_path: Path, random_components: Components
) -> None:
    module = fake(*TENSORRT, "CPUExecutionProvider")
    spec = random_components.specs(batch=BatchRange(2, 2, 2))["align"]
    OrtEngine(Path("a.onnx"), spec, device="cuda", tensorrt=tmp_path)
    assert not any("profile" in name for name in module.asked["provider_options"][0])


@pytest.mark.parametrize(
    "runs_on",
    [("CPUExecutionProvider",), ("CUDAExecutionProvider", "CPUExecutionProvider")],
)
def test_a_fallback_is_refused(fake: Any, tmp_path: Path, runs_on: tuple[str, ...]) -> None:
    fake(*runs_on)
    with pytest.raises(BackendError, match=r"TensorrtExecutionProvider.*TensorRT release"):
        open_session(tmp_path / "a.onnx", TENSORRT)


def test_nodes_that_tensorrt_does_not_take_are_refused(fake: Any, tmp_path: Path) -> None:
    said = (
        "This session contains graph nodes that are assigned to the default CPU EP, but fallback to"
        " CPU EP has been explicitly disabled by the user."
    )
    fake(fails=said)
    with pytest.raises(BackendError, match=r"whole graph.*backend tensorrt"):
        open_session(tmp_path / "a.onnx", TENSORRT)
    fake(fails="no graph")
    with pytest.raises(EngineError, match=r"cannot read this graph .no graph"):
        open_session(tmp_path / "a.onnx", TENSORRT)


def test_the_installed_build_without_it_says_so(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if TENSORRT[0] in onnxruntime.get_available_providers():
        pytest.skip("this build has the provider")
    with pytest.raises(BackendError, match="does not offer this execution provider"):
        open_session(tmp_path / "a.onnx", TENSORRT)


def test_it_is_a_backend_of_gpus_in_half_precision() -> None:
    assert devices_of("onnxruntime-tensorrt") == ("cuda",)
    target = Target("onnxruntime-tensorrt", precision="float16")
    assert not target.native and target.batch_range == BatchRange(1, 1, 8)
    with pytest.raises(BackendError, match="float16"):
        Target("onnxruntime-tensorrt")
    assert default_precision("onnxruntime-tensorrt") == "float16"
    assert default_precision("onnxruntime") == default_precision("eager") == "float32"


@pytest.mark.slow
def test_its_folder_is_built_without_a_gpu_and_says_what_was_compared(
    random_components: Components, tmp_path: Path
) -> None:
    target = Target("onnxruntime-tensorrt", precision="float16")
    manifest = build(random_components, tmp_path / "engine", target)
    assert {graph.checked for graph in manifest.graphs.values()} == {"onnx"}
    assert {graph.file for graph in manifest.graphs.values()} == {
        f"{name}.onnx" for name in manifest.graphs
    }
    with pytest.raises(BackendError, match=r"CUDA|execution provider"):
        HCMAPipeline.from_engines(tmp_path / "engine")


@pytest.mark.gpu
def test_runs_on_a_gpu_as_torch_does(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "engine"
    build(random_components, folder, Target("onnxruntime-tensorrt", precision="float16"))
    for _, record, error in verify(folder, random_components):
        assert error <= record.tolerance
    assert list((tmp_path / "cache").glob("kernels/*/*.engine"))
    out = HCMAPipeline.from_engines(folder)("a dog", Layout([], []), num_inference_steps=2)
    assert len(out.images) == 1
