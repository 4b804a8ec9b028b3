"""What is compiled for an engine is found again, and goes when the engine is gone."""

from __future__ import annotations

import hashlib
import json
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
    for name in ("whole", "damaged"):
        (folder / name).write_bytes(b"abc")
    note_hashes(folder)
    (folder / "damaged").write_bytes(b"abd")
    (folder / "cut off").write_bytes(b"a")
    drop_damaged(folder)
    assert {path.name for path in folder.iterdir()} == {"whole", "engine", "hashes.json"}
    (folder / "hashes.json").write_text("[")
    drop_damaged(folder)
    assert not (folder / "whole").exists()
