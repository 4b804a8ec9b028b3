"""What is compiled for an engine is found again, and goes when the engine is gone."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from hcma_fast.export.cache import list_cache, prune_cache
from hcma_fast.export.kernel_cache import drop_damaged, kernel_folder, note_hashes
from hcma_fast.export.manifest import MANIFEST_FILE


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _engine(folder: Path, content: bytes = b"engine") -> tuple[Path, str]:
    folder.mkdir(parents=True, exist_ok=True)
    file, digest = folder / "align.engine", hashlib.sha256(content).hexdigest()
    file.write_bytes(content)
    graphs = {"align": {"file": file.name, "sha256": digest}}
    (folder / MANIFEST_FILE).write_text(json.dumps({"graphs": graphs}))
    return file, digest


def test_kernels_stay_while_their_engine_does_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    kernels = kernel_folder(*_engine(tmp_path / "mine"))
    (kernels / "sm8-9").write_bytes(b"kernels")
    [entry] = list_cache()
    assert (entry.folder, entry.state) == (kernels, "current") and entry.size_bytes > 7
    assert prune_cache() == [] and (kernels / "sm8-9").is_file()
    assert prune_cache(older_than_days=-1) == [kernels] and not kernels.exists()


@pytest.mark.parametrize("how", ["rebuilt", "removed", "unnamed", "file"])
def test_kernels_of_an_engine_that_is_gone_are_removed(
    root: Path, tmp_path: Path, how: str
) -> None:
    engine, digest = _engine(tmp_path / "mine")
    kernels = kernel_folder(engine, digest)
    if how == "rebuilt":
        _engine(engine.parent, b"another")
    elif how == "removed":
        engine.unlink()
    elif how == "unnamed":
        (kernels / "engine").unlink()
    else:  # as earlier versions kept them
        kernels = kernels.with_name(f"{kernels.name}-sm8-9")
        kernels.write_bytes(b"kernels")
    stale = [entry for entry in list_cache() if entry.state == "stale"]
    assert [entry.folder for entry in stale] == [kernels] and "gone" in stale[0].reason
    assert prune_cache() == [kernels] and not kernels.exists()


def test_kernels_go_with_the_engine_that_is_pruned(root: Path) -> None:
    engine, digest = _engine(root / ("tensorrt-rtx-" + "a" * 24))  # its manifest is no whole one
    kernels = kernel_folder(engine, digest)
    assert prune_cache() == [engine.parent, kernels] and not kernels.exists()


def test_a_cache_that_cannot_be_written_is_no_error(root: Path, tmp_path: Path) -> None:
    root.write_text("a file")
    assert not kernel_folder(*_engine(tmp_path / "mine")).exists()


def test_only_files_that_were_noted_and_are_whole_stay(root: Path, tmp_path: Path) -> None:
    folder = kernel_folder(*_engine(tmp_path / "mine"))
    for name in ("whole.engine", "damaged.profile", "mine.txt"):
        (folder / name).write_bytes(b"abc")
    note_hashes(folder)
    (folder / "damaged.profile").write_bytes(b"abd")
    (folder / "cut off.timing").write_bytes(b"a")
    (folder / "mine.txt").write_bytes(b"no library's file")
    drop_damaged(folder)
    kept = {"engine", "hashes.json", "mine.txt"}
    assert {path.name for path in folder.iterdir()} == {"whole.engine", *kept}
    for junk in ("[", "[]", "null", '{"whole.engine": 1}', "[" * 10**5):
        (folder / "whole.engine").write_bytes(b"abc")
        (folder / "hashes.json").write_text(junk)
        drop_damaged(folder)
        assert {path.name for path in folder.iterdir()} == kept


def test_only_what_the_libraries_wrote_is_removed(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, digest = _engine(tmp_path / "mine")
    kernels = kernel_folder(engine, digest)
    engine.unlink()
    (root / "kernels" / "photos").mkdir()
    for name in ("thesis.tex", "notes/"):
        mine = kernels / name
        mine.mkdir() if name.endswith("/") else mine.write_text("years of work")
        assert prune_cache(everything=True) == [] and mine.exists()
        assert str(mine) in caplog.text and (kernels / "engine").is_file()
        mine.rmdir() if name.endswith("/") else mine.unlink()
    assert prune_cache() == [kernels] and (root / "kernels" / "photos").is_dir()


def test_junk_in_place_of_an_engine_is_no_engine(root: Path, tmp_path: Path) -> None:
    """A pipe would be waited for; JSON of another form would be a TypeError."""
    engine, digest = _engine(tmp_path / "mine")
    kernels = kernel_folder(engine, digest)
    manifest = engine.parent / MANIFEST_FILE
    for junk in ("[]", "null", "1", '{"graphs": [1]}', '{"graphs": {"a": []}}', "[" * 10**5):
        manifest.write_text(junk)
        assert [entry.state for entry in list_cache()] == ["stale"], junk[:20]
    for path in (manifest, kernels / "engine"):
        path.unlink()
        os.mkfifo(path)
        assert [entry.state for entry in list_cache()] == ["stale"]
    assert prune_cache() == [kernels]
