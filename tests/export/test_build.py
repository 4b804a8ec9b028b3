"""Building engine folders, the cache, and what happens when something goes wrong on the way."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.errors import BackendError, EngineError, InputError, UsageError
from hcma_fast.export import build as module
from hcma_fast.export.build import (
    build,
    cache_root,
    cached_engine,
    cached_folder,
    engine_key,
    find_or_build,
)
from hcma_fast.export.manifest import MANIFEST_FILE, load_manifest
from hcma_fast.models.weights import Components
from hcma_fast.specs import GRAPH_NAMES

LAYOUTS = [
    Layout(["dog", "cat"], [[0.0, 0.1, 0.5, 0.6], [0.45, 0.3, 1.0, 1.0]]),
    Layout.empty(),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cached(cache: Path, random_engine: Path, random_components: Components) -> Path:
    """A copy of the engine, in the place where the cache looks for it."""
    folder = cached_folder(random_components.weights_hash, "onnxruntime")
    shutil.copytree(random_engine, folder)
    return folder


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing should be built")

    monkeypatch.setattr(module, "build", fail)


def test_folder_holds_six_validated_graphs(
    random_engine: Path, random_components: Components
) -> None:
    manifest = load_manifest(random_engine)
    assert set(manifest.graphs) == set(GRAPH_NAMES)
    for name, record in manifest.graphs.items():
        assert record.spec == random_components.specs()[name]
        assert 0 <= record.parity <= record.tolerance <= 1e-4
        assert (random_engine / record.file).stat().st_size == record.size_bytes
    assert manifest.weights_hash == random_components.weights_hash
    assert manifest.key == engine_key(random_components.weights_hash, "onnxruntime")
    on_disk = {p.relative_to(random_engine).as_posix() for p in random_engine.rglob("*.*")}
    assert on_disk == {*manifest.files, MANIFEST_FILE}


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"grounding_beta": 0.3}])
def test_pipeline_agrees_with_eager_over_50_steps(
    random_engine: Path, random_components: Components, settings: dict[str, float]
) -> None:
    eager = HCMAPipeline.from_components(random_components)
    compiled = HCMAPipeline.from_pretrained(random_engine)
    assert (compiled.backend, compiled.components) == ("onnxruntime", None)
    arguments = {"seed": 3, "output_type": "latent", "eta0": 2.0, **settings}
    a = eager(["a dog and a cat", "nothing"], LAYOUTS, **arguments)  # type: ignore[arg-type]
    b = compiled(["a dog and a cat", "nothing"], LAYOUTS, **arguments)  # type: ignore[arg-type]
    assert (a.latents - b.latents).norm() / a.latents.norm() < 1e-3
    assert len(a.losses) == len(b.losses) == 50
    for one, other in zip(a.losses, b.losses, strict=True):
        torch.testing.assert_close(one.loss_local, other.loss_local, rtol=1e-2, atol=1e-4)


def test_from_pretrained_takes_the_cached_engine_without_loading_weights(
    cached: Path,
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights should not be loaded")

    monkeypatch.setattr("hcma_fast.runtime.pipeline.load_components", fail)
    pipe = HCMAPipeline.from_pretrained(random_checkpoint, backend="onnxruntime")
    assert pipe.engine_hash == load_manifest(cached).engine_hash
    with pytest.raises(BackendError, match="built for onnxruntime"):
        HCMAPipeline.from_pretrained(cached, backend="eager")


@pytest.mark.parametrize("arguments", [{"device": "meta"}, {"aligner": "elsewhere"}])
def test_an_engine_folder_takes_no_device_and_no_aligner(
    random_engine: Path, arguments: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="engine folder"):
        HCMAPipeline.from_pretrained(random_engine, **arguments)  # type: ignore[arg-type]


def test_half_a_cached_engine_is_replaced(
    cached: Path,
    random_engine: Path,
    random_components: Components,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (cached / MANIFEST_FILE).unlink()

    def stand_in(components: Components, target: Path, *args: object, **kwargs: object) -> None:
        shutil.copytree(random_engine, target)

    monkeypatch.setattr(module, "build", stand_in)
    assert find_or_build(random_components, "onnxruntime") == cached
    load_manifest(cached)


@pytest.mark.usefixtures("no_build")
def test_second_call_finds_the_first_build(cached: Path, random_components: Components) -> None:
    assert find_or_build(random_components, "onnxruntime") == cached


def test_a_damaged_cached_engine_is_reported_and_not_used(
    cached: Path, random_components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    file = cached / "align.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "hcma_fast"):
        assert cached_engine(random_components.weights_hash, "onnxruntime") is None
    assert "align.onnx" in caplog.text


def test_key_follows_weights_versions_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    key = engine_key("a", "onnxruntime")
    assert key == engine_key("a", "onnxruntime")
    assert key != engine_key("b", "onnxruntime")
    monkeypatch.setattr(module, "onnxruntime_version", lambda: "0.0")
    assert key != engine_key("a", "onnxruntime")
    monkeypatch.undo()
    monkeypatch.setattr(module, "_code_hash", lambda: "other")
    assert key != engine_key("a", "onnxruntime")


def test_cache_root_is_the_users_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCMA_FAST_CACHE", raising=False)
    assert cache_root().name == "hcma-fast"
    monkeypatch.setenv("HCMA_FAST_CACHE", "/somewhere")
    assert cache_root() == Path("/somewhere")


def test_refuses_to_replace_what_it_did_not_write(
    tmp_path: Path, random_components: Components, random_engine: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an engine folder"):
        build(random_components, tmp_path, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError, match="--force"):
        build(random_components, random_engine)


def test_unknown_and_missing_backends(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="Backends: onnxruntime"):
        build(random_components, tmp_path / "x", "caffe")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install .*hcma-fast\[cpu\]"):
        build(random_components, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_unwritable_places_are_typed_errors(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"):
        build(random_components, tmp_path / "file" / "engine")
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="HCMA_FAST_CACHE"):
        find_or_build(random_components, "onnxruntime")


def test_a_failed_validation_leaves_nothing(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: 0.5)
    with pytest.raises(EngineError, match="text_encoder does not agree"):
        build(random_components, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_kill_during_build_leaves_no_engine_and_is_cleaned_up(
    cache: Path,
    random_checkpoint: Path,
    random_components: Components,
    random_engine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = (
        "import sys; from hcma_fast.export.build import find_or_build\n"
        "from hcma_fast.models.weights import load_components\n"
        "tell = lambda graph, stage: print(graph, stage, flush=True)\n"
        "find_or_build(load_components(sys.argv[1]), 'onnxruntime', progress=tell)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(random_checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HCMA_FAST_CACHE": str(cache), "PYTHONSAFEPATH": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("grounding export"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    folder = cached_folder(random_components.weights_hash, "onnxruntime")
    leftovers = [path for path in cache.iterdir() if path.is_dir()]
    assert len(leftovers) == 1 and leftovers[0].name.startswith(f".{folder.name}.part-")
    assert cached_engine(random_components.weights_hash, "onnxruntime") is None

    def stand_in(components: Components, target: Path, *args: object, **kwargs: object) -> None:
        shutil.copytree(random_engine, target)

    monkeypatch.setattr(module, "build", stand_in)
    started = time.monotonic()
    assert find_or_build(random_components, "onnxruntime") == folder
    assert time.monotonic() - started < 60, "the lock of a killed process must not be waited for"
    assert not leftovers[0].exists()


@pytest.mark.usefixtures("no_build")
def test_the_lock_is_free_again_after_each_call(
    cached: Path, random_components: Components
) -> None:
    for _ in range(3):
        assert find_or_build(random_components, "onnxruntime") == cached
