"""Building engine folders, the cache, and what happens when something goes wrong on the way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.config import cache_root
from hcma_fast.errors import BackendError, EngineError, InputError, UsageError
from hcma_fast.export import build as build_module
from hcma_fast.export import cache as module
from hcma_fast.export import key as key_module
from hcma_fast.export.build import build
from hcma_fast.export.cache import (
    cached_engine,
    cached_folder,
    find_or_build,
    list_cache,
    prune_cache,
)
from hcma_fast.export.key import key_of, key_parts
from hcma_fast.export.manifest import MANIFEST_FILE, load_manifest
from hcma_fast.export.target import Target
from hcma_fast.export.weights_file import WEIGHTS_FILE
from hcma_fast.models.weights import Components
from hcma_fast.specs import GRAPH_NAMES, BatchRange

ORT = Target(backend="onnxruntime")


def find(components: Components) -> Path:
    return find_or_build(components.weights_hash, lambda: components, ORT)


def key(weights_hash: str, **target: object) -> str:
    return key_of(key_parts(weights_hash, Target(**{"backend": "onnxruntime", **target})))  # type: ignore[arg-type]


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
    folder = cached_folder(random_components.weights_hash, ORT)
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
        assert record.checked == "engine"
        assert 0 <= record.parity <= record.tolerance <= 1e-4
        assert (random_engine / record.file).stat().st_size == record.size_bytes
    assert manifest.weights_hash == random_components.weights_hash
    assert manifest.key == key(random_components.weights_hash)
    assert manifest.target == ORT
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


@pytest.mark.parametrize("arguments", [{"precision": "float16"}, {"aligner": "elsewhere"}])
def test_an_engine_folder_takes_no_precision_and_no_aligner(
    random_engine: Path, arguments: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="engine folder"):
        HCMAPipeline.from_pretrained(random_engine, **arguments)  # type: ignore[arg-type]


def test_an_engine_folder_runs_where_its_backend_does(random_engine: Path) -> None:
    with pytest.raises(BackendError, match="onnxruntime does not run on this device"):
        HCMAPipeline.from_pretrained(random_engine, device="meta")


def test_half_a_cached_engine_is_replaced(
    cached: Path,
    random_engine: Path,
    random_components: Components,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (cached / MANIFEST_FILE).unlink()

    def stand_in(components: Components, folder: Path, *args: object, **kwargs: object) -> None:
        shutil.copytree(random_engine, folder)

    monkeypatch.setattr(module, "build", stand_in)
    assert find(random_components) == cached
    load_manifest(cached)


@pytest.mark.usefixtures("no_build")
def test_second_call_finds_the_first_build(cached: Path, random_components: Components) -> None:
    assert find(random_components) == cached


def test_a_damaged_cached_engine_is_reported_and_not_used(
    cached: Path, random_components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    file = cached / "align.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "hcma_fast"):
        assert cached_engine(random_components.weights_hash, ORT) is None
    assert "align.onnx" in caplog.text


def test_key_follows_weights_target_versions_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    first = key("a")
    assert first == key("a")
    others = [
        key("b"),
        key("a", precision="float16"),
        key("a", batch=BatchRange(1, 1, 1)),
        key("a", height=128),
        key("a", backend="openvino"),
    ]
    monkeypatch.setattr("hcma_fast.export.target.onnxruntime_version", lambda: "0.0")
    others.append(key("a"))
    monkeypatch.undo()
    monkeypatch.setattr(key_module, "code_hash", lambda: "other")
    others.append(key("a"))
    assert len({first, *others}) == 1 + len(others)


def test_a_miss_says_what_differs(
    cached: Path, random_components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hcma_fast"):
        other = Target(backend="onnxruntime", precision="float16")
        assert cached_engine(random_components.weights_hash, other) is None
    assert "differ in: precision." in caplog.text


BROKEN, STALE = (f"onnxruntime-{letter * 24}" for letter in "ab")


def test_list_and_prune(cached: Path, random_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cached.parent / f".{cached.name}.part-abc").mkdir()
    (cached.parent / BROKEN).mkdir()
    for name in ("quality", "photos", "onnxruntime-mine"):
        (cached.parent / name).mkdir()
    stale = cached.parent / STALE
    shutil.copytree(random_engine, stale)
    manifest = json.loads((stale / MANIFEST_FILE).read_text())
    manifest["key_parts"]["libraries"] = "torch 1.0"
    (stale / MANIFEST_FILE).write_text(json.dumps(manifest))
    states = {entry.folder.name: entry.state for entry in list_cache()}
    assert states == {
        cached.name: "current",
        f".{cached.name}.part-abc": "leftover",
        BROKEN: "damaged",
        STALE: "stale",
    }
    entry = next(entry for entry in list_cache() if entry.folder == stale)
    assert entry.reason == "another libraries" and entry.size_bytes > 1000
    held = FileLock(cached.with_name(f".{cached.name}.lock"))
    with held.acquire():
        # its build may still run
        assert {path.name for path in prune_cache()} == {BROKEN, STALE}
    assert [path.name for path in prune_cache()] == [f".{cached.name}.part-abc"]
    assert prune_cache(older_than_days=1) == [] and prune_cache(older_than_days=-1) == [cached]
    assert list_cache() == []
    assert sorted(path.name for path in cached.parent.iterdir() if path.is_dir()) == [
        "onnxruntime-mine",
        "photos",
        "quality",
    ]


def test_engines_of_another_environment_stay(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise BackendError("not installed", remedy="Install it.")

    monkeypatch.setattr("hcma_fast.export.target.onnxruntime_version", missing)
    assert [entry.state for entry in list_cache()] == ["elsewhere"]
    assert prune_cache() == [] and cached.is_dir()


def test_engines_of_another_version_or_machine_are_refused(
    random_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcma_fast.export.target.onnxruntime_version", lambda: "0.0")
    with pytest.raises(EngineError, match=r"built with onnxruntime 1\.") as caught:
        HCMAPipeline.from_pretrained(random_engine)
    assert caught.value.exit_code == 6


def test_equal_weights_are_stored_once(random_engine: Path, random_components: Components) -> None:
    unet = sum(p.numel() * 4 for p in random_components.unet.parameters())
    everything = sum(
        sum(p.numel() * 4 for p in part.parameters())
        for part in (
            random_components.text_encoder,
            random_components.aligner,
            random_components.vae.decoder,
        )
    )
    size = (random_engine / WEIGHTS_FILE).stat().st_size
    # two UNet graphs and the grounding's share of them, in the space of one
    assert size < 1.05 * (unet + everything)


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
        build(random_components, tmp_path, ORT, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError, match="--force"):
        build(random_components, random_engine, ORT)


def test_unknown_and_missing_backends(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="Backends: onnxruntime"):
        Target(backend="caffe")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install .*hcma-fast\[cpu\]"):
        build(random_components, tmp_path / "x", ORT)
    assert not (tmp_path / "x").exists()


def test_unwritable_places_are_typed_errors(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"):
        build(random_components, tmp_path / "file" / "engine", ORT)
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="HCMA_FAST_CACHE"):
        find(random_components)


def test_a_failed_validation_leaves_nothing(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "compare", lambda *args: 0.5)
    with pytest.raises(EngineError, match="text_encoder does not agree"):
        build(random_components, tmp_path / "engine", ORT)
    assert list(tmp_path.iterdir()) == []


def test_kill_during_build_leaves_no_engine_and_is_cleaned_up(
    cache: Path,
    random_checkpoint: Path,
    random_components: Components,
    random_engine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # it kills itself: a signal from here might come when the build is over
    script = (
        "import os, signal, sys\n"
        "from hcma_fast.export.cache import find_or_build\n"
        "from hcma_fast.export.target import Target\n"
        "from hcma_fast.models.weights import load_components\n"
        "def die(graph, stage):\n"
        "    if (graph, stage) == ('grounding', 'export'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "parts = load_components(sys.argv[1])\n"
        "find_or_build(parts.weights_hash, lambda: parts, Target('onnxruntime'), progress=die)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(random_checkpoint)],
        env={**os.environ, "HCMA_FAST_CACHE": str(cache), "PYTHONSAFEPATH": "1"},
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    folder = cached_folder(random_components.weights_hash, ORT)
    leftovers = [path for path in cache.iterdir() if path.is_dir()]
    assert len(leftovers) == 1 and leftovers[0].name.startswith(f".{folder.name}.part-")
    assert cached_engine(random_components.weights_hash, ORT) is None

    def stand_in(components: Components, folder: Path, *args: object, **kwargs: object) -> None:
        shutil.copytree(random_engine, folder)

    monkeypatch.setattr(module, "build", stand_in)
    started = time.monotonic()
    assert find(random_components) == folder
    assert time.monotonic() - started < 60, "the lock of a killed process must not be waited for"
    assert not leftovers[0].exists()


@pytest.mark.usefixtures("no_build")
def test_the_lock_is_free_again_after_each_call(
    cached: Path, random_components: Components
) -> None:
    for _ in range(3):
        assert find(random_components) == cached


@pytest.mark.parametrize(
    ("names", "heavy", "order"),
    [
        ("abcdef", "cf", "cabfde"),
        ("abc", "", "abc"),
        ("abcd", "d", "dabc"),
        ("ab", "ab", "ab"),
        ("abcdefg", "beg", "bacedfg"),
    ],
)
def test_light_graphs_are_exported_while_heavy_ones_are_compiled(
    names: str, heavy: str, order: str
) -> None:
    found = build_module.in_turns(list(names), list(heavy))  # type: ignore[arg-type]
    assert "".join(found) == order


def test_heavy_graphs_wait_for_each_other_and_a_failure_ends_the_build(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is a stand-in: what is tested is who waits for whom."""
    events: list[str] = []
    begun = threading.Event()

    def export(source: object, spec: Any, folder: Path, *rest: object) -> Any:
        events.append(f"export {spec.graph}")
        if spec.graph == "text_encoder":
            assert begun.wait(10), "the heavy graph is compiled meanwhile"
        return build_module._Checked(folder / f"{spec.graph}.onnx", 0.0, 1.0, 0.0)

    def compile_(checked: Any, spec: Any, *rest: object) -> Any:
        begun.set()
        if spec.graph == "unet_plain":
            raise EngineError("no such layer", value="x", remedy="None.")
        time.sleep(0.2)
        events.append(f"compiled {spec.graph}")
        return None

    counts = {name: 10 for name in GRAPH_NAMES} | {"unet_grounded": 10**9, "unet_plain": 10**9}
    monkeypatch.setattr(build_module, "graph_weights", lambda source, target: counts)
    monkeypatch.setattr(build_module, "check_resources", lambda *args: None)
    monkeypatch.setattr(build_module, "_export_one", export)
    monkeypatch.setattr(build_module, "_compile_one", compile_)
    monkeypatch.setattr(build_module, "_free_memory", lambda: time.sleep(0.05))
    with pytest.raises(EngineError, match="no such layer"):
        build_module.build(random_components, tmp_path / "engine", Target("onnxruntime"))
    assert events.index("compiled unet_grounded") < events.index("export unet_plain")
    assert events.index("export grounding") < events.index("export unet_plain")
    assert "export vae_decoder" not in events, "the build went on after a graph had failed"
    assert not list(tmp_path.iterdir())
