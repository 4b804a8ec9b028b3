"""The ONNX Runtime engine: same results as torch, ignored extras, and typed memory errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hcma_fast.errors import DeviceMemoryError, UsageError
from hcma_fast.export.backends.onnxruntime import engine as ort
from hcma_fast.export.backends.onnxruntime.engine import OrtEngine, splits
from hcma_fast.export.manifest import VerifiedFolder, load_manifest
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.open import open_engines
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import BatchRange


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


@torch.no_grad()
@pytest.mark.parametrize(("batch", "threads"), [(2, 2), (7, 2), (6, 3), (4, 4)])
def test_a_batch_is_split_over_the_threads_and_comes_out_the_same(
    random_engine: Path, random_components: Components, batch: int, threads: int
) -> None:
    spec = random_components.specs()["align"]
    inputs = random_inputs(spec, batch, torch.Generator().manual_seed(1))
    split = OrtEngine(random_engine / "align.onnx", spec, threads=threads)
    whole = OrtEngine(random_engine / "align.onnx", spec, threads=1)
    found, expected = split(inputs), whole(inputs)
    assert set(split._sessions) == {1}
    for name in spec.output_names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_a_batch_that_would_leave_threads_idle_or_that_is_static_is_run_as_a_whole(
    random_components: Components,
) -> None:
    spec = random_components.specs()["unet_plain"]
    assert [batch for batch in range(1, 10) if splits(batch, 2, spec)] == [2, 4, 6, 7, 8, 9]
    assert not splits(8, 1, spec)
    assert not splits(2, 16, spec)
    static = random_components.specs(batch=BatchRange(1, 1, 1))["unet_plain"]
    assert static.batch.static and not splits(static.batch.min, 2, static)


@pytest.mark.parametrize(("device", "card"), [("cuda", "0"), ("cuda:1", "1")])
def test_the_session_is_on_the_card_that_was_asked_for(
    random_components: Components, monkeypatch: pytest.MonkeyPatch, device: str, card: str
) -> None:
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(
        ort,
        "open_session",
        lambda path, providers, provider_options: asked.append(provider_options),
    )
    monkeypatch.setattr(ort, "cuda_runner", lambda session, spec, place: None)
    OrtEngine(Path("a.onnx"), random_components.specs()["align"], device=device)
    assert asked == [{"device_id": card, "use_tf32": "0"}]


def test_tensorrt_says_how_to_choose_another_card(
    random_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcma_fast.export.open.check_usable", lambda manifest: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    manifest = load_manifest(random_engine)
    target = dataclasses.replace(manifest.target, backend="tensorrt", precision="float16")
    manifest = manifest.model_copy(update={"backend": "tensorrt", "target": target})
    opened: list[str] = []
    monkeypatch.setattr(
        "hcma_fast.export.open.open_engine",
        lambda folder, name, device: opened.append(name),
    )
    folder = VerifiedFolder(random_engine, manifest, {})
    open_engines(folder, "cuda:0")
    assert len(opened) == 6
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=1"):
        open_engines(folder, "cuda:1")
    # not asked where it does not matter: without a GPU that would be an error of torch's own
    monkeypatch.delattr(torch.cuda, "current_device")
    open_engines(folder, "cuda")
