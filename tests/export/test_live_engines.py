"""Engines come from the bytes that were hashed, whatever happens to their folder afterwards."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.config import cache_root
from hcma_fast.errors import EngineError
from hcma_fast.export import open as opening
from hcma_fast.export.backends.onnxruntime.engine import OrtEngine
from hcma_fast.export.backends.trt import engine as trt_engine
from hcma_fast.export.cache import cached_engine, cached_folder, prune_cache
from hcma_fast.export.manifest import VerifiedFolder, open_folder
from hcma_fast.export.onnx.file import OnnxFile
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.open import open_engine
from hcma_fast.export.target import Target, backend_version
from hcma_fast.models.checkpoint.folder import Components, load_components, locate
from hcma_fast.opened import OpenedFile

ORT = Target("onnxruntime")


@pytest.fixture
def folder(random_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_engine, tmp_path / "engine"))


def swap(folder: Path) -> None:
    """Put other files under the names of those of the engine."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        other = path.with_name("other")
        other.write_bytes(b"other")
        other.replace(path)


CHANGES: dict[str, Callable[[Path], Any]] = {"swapped": swap, "removed": shutil.rmtree}


def as_target(opened: VerifiedFolder, target: Target) -> VerifiedFolder:
    """The same graphs as a folder of ``target``."""
    changes = {"target": target, "backend_version": backend_version(target.backend)}
    return dataclasses.replace(opened, manifest=opened.manifest.model_copy(update=changes))


def image(pipe: HCMAPipeline) -> torch.Tensor:
    layout = Layout(["dog"], [(0.1, 0.1, 0.6, 0.6)])
    out = pipe("a dog", layout, num_inference_steps=2, seed=1, output_type="pt")
    return torch.as_tensor(out.images)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_changed_folder_does_not_reach_a_live_pipeline(
    folder: Path, random_engine: Path, backend: str
) -> None:
    pytest.importorskip(backend)
    target = Target(backend)
    expected = image(HCMAPipeline.from_engines(as_target(open_folder(random_engine), target)))
    checked = as_target(open_folder(folder), target)
    pipes = [HCMAPipeline.from_engines(as_target(open_folder(folder), target))]
    swap(folder)
    pipes.append(HCMAPipeline.from_engines(checked))
    with pytest.raises(EngineError):
        HCMAPipeline.from_engines(folder)
    shutil.rmtree(folder)
    for pipe in pipes:
        assert torch.equal(image(pipe), expected)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_sessions_for_other_numbers_of_threads_are_of_the_same_bytes(
    folder: Path, random_components: Components, change: str
) -> None:
    spec = random_components.specs()["align"]
    inputs = {n: random_inputs(spec, n, torch.Generator().manual_seed(n)) for n in (1, 2)}
    whole = OrtEngine(OnnxFile.open(folder / "align.onnx"), spec, threads=2)
    expected = {n: whole(given) for n, given in inputs.items()}
    engine = OrtEngine(OnnxFile.open(folder / "align.onnx"), spec, threads=2)
    engine(inputs[1])
    CHANGES[change](folder)
    for n, given in inputs.items():
        found = engine(given)
        assert all(torch.equal(found[name], expected[n][name]) for name in spec.output_names)


def test_pruning_does_not_reach_a_live_pipeline(
    random_engine: Path,
    random_checkpoint: Path,
    random_components: Components,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    cached = cached_folder(random_components.weights_hash, ORT)
    shutil.copytree(random_engine, cached)
    expected = image(HCMAPipeline.from_engines(random_engine))
    found = cached_engine(random_components.weights_hash, ORT)
    assert found is not None
    pipe = HCMAPipeline.from_pretrained(random_checkpoint, backend="onnxruntime")
    assert prune_cache(everything=True) and not list(cache_root().glob("onnxruntime-*"))
    assert torch.equal(image(pipe), expected)
    assert torch.equal(image(HCMAPipeline.from_engines(found)), expected)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what is read")
def test_a_start_reads_each_byte_once(
    random_engine: Path,
    random_checkpoint: Path,
    random_components: Components,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    cached = cached_folder(random_components.weights_hash, ORT)
    shutil.copytree(random_engine, cached)

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def bytes_read(start: Callable[[], HCMAPipeline]) -> int:
        start()  # imports read files too
        before = _read_so_far()
        image(start())
        return _read_so_far() - before

    slack = size(cached) // 4
    engine = bytes_read(lambda: HCMAPipeline.from_engines(cached))
    assert size(cached) // 2 < engine < size(cached) + slack
    # the weights are hashed for the look-up
    both = bytes_read(lambda: HCMAPipeline.from_pretrained(random_checkpoint, backend=ORT.backend))
    assert both < size(cached) + size(random_checkpoint) + slack


def _read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_checkpoint_is_loaded_from_what_was_hashed(
    random_checkpoint: Path, random_components: Components, tmp_path: Path
) -> None:
    for name, change in CHANGES.items():
        copy = Path(shutil.copytree(random_checkpoint, tmp_path / name))
        checkpoint = locate(copy)
        assert checkpoint.weights_hash == random_components.weights_hash
        change(copy)
        parts = load_components(checkpoint)
        assert (parts.source, parts.settings) == (copy, random_components.settings)
        assert parts.tokenizer.get_vocab() == random_components.tokenizer.get_vocab()
        for part in ("unet", "vae", "text_encoder", "aligner"):
            expected = getattr(random_components, part).state_dict()
            found = getattr(parts, part).state_dict()
            assert all(torch.equal(found[key], value) for key, value in expected.items())
        # a saved config must not depend on a temporary folder
        assert parts.unet.config["_name_or_path"] == str(copy / "unet")


def test_libraries_that_insist_on_a_path_get_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    graph, weights = ((folder / name).read_bytes() for name in ("align.onnx", "weights.bin"))
    seen: list[tuple[bytes, bytes]] = []

    def opens(source: Path, *args: object, weights_onnx: Path | None = None, **more: object) -> str:
        path = weights_onnx or source
        assert not path.is_symlink() and path.parent != folder
        seen.append((path.read_bytes(), (path.parent / "weights.bin").read_bytes()))
        return "engine"

    monkeypatch.setattr(opening, "OrtEngine", opens)
    monkeypatch.setattr(opening, "TRTEngine", opens)
    opened = open_folder(folder)
    record = opened.manifest.graphs["align"].model_copy(update={"file": "align.engine"})
    stripped = Target("tensorrt", strip_weights=True)
    rewritten = opened.manifest.model_copy(update={"target": stripped, "graphs": {"align": record}})
    files = {**opened.files, "align.engine": opened.files["align.onnx"]}
    engines = VerifiedFolder(folder, rewritten, files)
    provider = opened.manifest.model_copy(
        update={"target": Target("onnxruntime-tensorrt", precision="float16")}
    )
    swap(folder)
    assert open_engine(engines, "align", "cuda") == "engine"  # type: ignore[comparison-overlap]
    assert open_engine(dataclasses.replace(opened, manifest=provider), "align", "cuda") == "engine"  # type: ignore[comparison-overlap]
    assert seen == [(graph, weights)] * 2


def test_tensorrt_deserializes_the_opened_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")

    class Library:
        @staticmethod
        def Runtime(log: object) -> Any:
            return Library

        @staticmethod
        def deserialize_cuda_engine(data: Any) -> bytes:
            return bytes(data)

    monkeypatch.setattr(trt_engine, "trt_module", lambda library: Library)
    (tmp_path / "a.engine").write_bytes(b"engine")
    opened = OpenedFile(tmp_path / "a.engine")
    swap(tmp_path)
    assert trt_engine.load_engine(opened, "tensorrt-rtx") == b"engine"
