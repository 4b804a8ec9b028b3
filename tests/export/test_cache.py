"""The cache of engines: what is found, built once, listed and removed."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from engine_edits import edit
from filelock import FileLock

from hcma_fast import HCMAPipeline
from hcma_fast.config import cache_root
from hcma_fast.errors import BackendError, InputError
from hcma_fast.export import cache as module
from hcma_fast.export import key as key_module
from hcma_fast.export.cache import (
    cached_engine,
    cached_folder,
    find_or_build,
    list_cache,
    prune_cache,
)
from hcma_fast.export.key import key_of, key_parts
from hcma_fast.export.manifest import MANIFEST_FILE, VerifiedFolder, load_manifest
from hcma_fast.export.target import Target
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import BatchRange

ORT = Target(backend="onnxruntime")


def find(components: Components) -> Path:
    return find_or_build(components.weights_hash, lambda: components, ORT).path


def key(weights_hash: str, **target: object) -> str:
    return key_of(key_parts(weights_hash, Target(**{"backend": "onnxruntime", **target})))  # type: ignore[arg-type]


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
    half = cached.parent / f".{cached.name}.part-abc"
    half.mkdir()
    (cached.parent / BROKEN).mkdir()
    for name in ("quality", "photos", "onnxruntime-mine"):
        (cached.parent / name).mkdir()
    stale = cached.parent / STALE
    shutil.copytree(random_engine, stale)
    edit(stale, lambda values: values["key_parts"].update(libraries="torch 1.0"), reseal=True)
    names = sorted(path.name for path in cached.parent.iterdir())
    states = {entry.folder.name: entry.state for entry in list_cache()}
    assert states == {
        cached.name: "current",
        half.name: "leftover",
        BROKEN: "damaged",
        STALE: "stale",
    }
    assert sorted(path.name for path in cached.parent.iterdir()) == names, "a list makes no file"
    entry = next(entry for entry in list_cache() if entry.folder == stale)
    assert entry.reason == "another libraries" and entry.size_bytes > 1000
    held = FileLock(cached.with_name(f".{cached.name}.lock"))
    with held.acquire():
        # its build may still run
        assert next(entry for entry in list_cache() if entry.folder == half).state == "building"
        assert {path.name for path in prune_cache()} == {BROKEN, STALE}
    assert [path.name for path in prune_cache()] == [half.name]
    assert prune_cache(older_than_days=1) == [] and prune_cache(older_than_days=-1) == [cached]
    assert list_cache() == []
    assert sorted(path.name for path in cached.parent.iterdir() if path.is_dir()) == [
        "onnxruntime-mine",
        "photos",
        "quality",
    ]


def _path(found: VerifiedFolder | None) -> Path | None:
    return None if found is None else found.path


def test_an_engine_under_another_ones_name_is_a_miss(
    cached: Path,
    random_engine: Path,
    random_components: Components,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Key, weights hash and target are compared; the folder's name alone says nothing."""
    hashed = random_components.weights_hash
    assert _path(cached_engine(hashed, ORT)) == cached
    # no batch sizes, and the default ones, are the same target
    default = Target("onnxruntime", batch=ORT.batch_range)
    assert _path(cached_engine(hashed, default)) == cached
    for change, word in (
        (lambda v: v["key_parts"].update(weights="0" * 64), "another weights"),
        (lambda v: v.update(weights_hash="0" * 64), "another weights"),
        (lambda v: v["key_parts"].update({"image size": "32x32"}), "another image size"),
        (lambda v: v["target"].update(height=32, width=32), "another target"),
        (lambda v: v["target"].update(backend="onnxruntime", precision="float16"), "target"),
        (lambda v: v["key_parts"].update(backend="openvino"), "another backend"),
        (lambda v: v["key_parts"].update(more="x"), "another key"),
    ):
        edit(cached, change, reseal=True)
        caplog.clear()
        assert cached_engine(hashed, ORT) is None
        assert word in caplog.text and "built again" in caplog.text
        assert [entry.state for entry in list_cache()] == ["stale"], word
        shutil.copy(random_engine / MANIFEST_FILE, cached)


def test_an_older_format_is_said_and_replaced(
    cached: Path, random_components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    edit(cached, lambda values: values.update(format=2), reseal=False)
    assert cached_engine(random_components.weights_hash, ORT) is None
    assert "older version" in caplog.text
    [entry] = list_cache()
    assert (entry.state, entry.reason) == ("stale", "it was built by an older version of hcma-fast")
    assert prune_cache() == [cached]


def test_junk_manifests_are_skipped_with_one_note(
    cache: Path, random_components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    junk = {
        "list": "[]",
        "null": "null",
        "number": "1",
        "word": '"x"',
        "deep": "[" * 10**5,
        "digits": "9" * 10**5,
        "parts": '{"key_parts": [1]}',
        "site": '{"name": "my web app"}',
    }
    for name, content in junk.items():
        (cache / name).mkdir(parents=True)
        (cache / name / MANIFEST_FILE).write_text(content)
    (cache / "huge").mkdir()
    with (cache / "huge" / MANIFEST_FILE).open("wb") as file:
        file.truncate(2**40)
    (cache / "pipe").mkdir()
    os.mkfifo(cache / "pipe" / MANIFEST_FILE)
    assert cached_engine(random_components.weights_hash, ORT) is None
    [record] = caplog.records
    assert "skipped in the cache" in record.getMessage()
    assert list_cache() == prune_cache(everything=True) == []
    assert {path.name for path in cache.iterdir()} == {*junk, "huge", "pipe"}


def test_junk_under_an_engines_name_is_damaged_and_built_anew(
    cached: Path, random_engine: Path, random_components: Components, monkeypatch: Any
) -> None:
    def stand_in(components: Components, folder: Path, *args: object, **kwargs: object) -> None:
        shutil.copytree(random_engine, folder)

    monkeypatch.setattr(module, "build", stand_in)
    for junk in ("[]", "null", "{", "[" * 10**5, None):
        (cached / MANIFEST_FILE).unlink()
        if junk is None:
            os.mkfifo(cached / MANIFEST_FILE)
        else:
            (cached / MANIFEST_FILE).write_text(junk)
        assert [entry.state for entry in list_cache()] == ["damaged"]
        assert find(random_components) == cached
        load_manifest(cached)


@pytest.mark.usefixtures("no_build")
@pytest.mark.parametrize("manifest", ["whole", "damaged", "missing"])
def test_a_users_files_in_the_cache_are_never_deleted(
    cached: Path,
    random_components: Components,
    caplog: pytest.LogCaptureFixture,
    manifest: str,
) -> None:
    part = cached.with_name(f".{cached.name}.part-abc")
    old = cached.with_name(f".{cached.name}.old-abc")
    shutil.copytree(cached, old / "engine")
    part.mkdir()
    mine = [cached / "thesis.tex", part / "thesis.tex", old / "engine" / "notes" / "thesis.tex"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
    if manifest == "damaged":
        (cached / MANIFEST_FILE).write_text("[]")
    elif manifest == "missing":
        (cached / MANIFEST_FILE).unlink()
    before = sorted(cached.parent.rglob("*"))
    assert prune_cache(everything=True) == []
    assert caplog.text.count("thesis.tex") == 3
    if manifest != "whole":  # there the build refuses, see test_build
        with pytest.raises(InputError, match=r"thesis\.tex"):
            find(random_components)
    locks = {path for path in cached.parent.iterdir() if path.suffix == ".lock"}
    assert sorted({*cached.parent.rglob("*")} - locks) == before
    for path in mine:
        path.unlink()
    (old / "engine" / "notes").rmdir()
    assert {*prune_cache(everything=True)} == {cached, part, old}


def test_engines_of_another_environment_stay(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise BackendError("not installed", remedy="Install it.")

    monkeypatch.setattr("hcma_fast.export.target.onnxruntime_version", missing)
    assert [entry.state for entry in list_cache()] == ["elsewhere"]
    assert prune_cache() == [] and cached.is_dir()


def test_cache_root_is_the_users_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCMA_FAST_CACHE", raising=False)
    assert cache_root().name == "hcma-fast"
    monkeypatch.setenv("HCMA_FAST_CACHE", "/somewhere")
    assert cache_root() == Path("/somewhere")


# test_build_killed.py kills at writes of a build around copied graphs, in a quarter of the time
@pytest.mark.slow
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
        "from hcma_fast.models.checkpoint.folder import load_components\n"
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
