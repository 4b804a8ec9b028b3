"""Folders of files that are each written whole or not at all."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcma_fast.errors import OutputError
from hcma_fast.files import write_folder


def save(value: float, count: int = 10) -> Callable[[Path], None]:
    """What a library's ``save_pretrained`` does: files written in place."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(f"{value}")
        save_file({"weight": torch.full((count,), value)}, folder / "model.safetensors")

    return write


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses what goes beyond 4 KiB of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def weight(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["weight"][0])


def test_files_are_replaced_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "part"
    write_folder(folder, save(1.0))
    (folder / "training.json").write_text("{}")
    write_folder(folder, save(2.0))
    assert weight(folder) == 2 and (folder / "config.json").read_text() == "2.0"
    assert (folder / "training.json").read_text() == "{}"
    assert [path.name for path in folder.parent.iterdir()] == ["part"]


def test_what_fails_half_way_leaves_the_old_files(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        save(2.0)(folder)
        raise KeyboardInterrupt

    write_folder(tmp_path / "part", save(1.0))
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "part", broken)
    assert weight(tmp_path / "part") == 1 and len(list((tmp_path / "part").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.usefixtures("small_files")
def test_no_room_for_weights_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "part", save(1.0))
    # safetensors' own writer, whose error is not an OSError
    with pytest.raises(OutputError, match="File too large") as caught:
        write_folder(tmp_path / "part", save(2.0, count=5000))
    assert caught.value.value == str(tmp_path / "part") and caught.value.exit_code == 3
    assert weight(tmp_path / "part") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.usefixtures("small_files")
def test_no_room_for_other_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File too large") as caught:
        write_folder(tmp_path / "part", lambda f: (f / "merges.txt").write_text("x" * 9000))
    assert caught.value.value == str(tmp_path / "part")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="Not a directory"):
        write_folder(tmp_path / "file" / "part", save(1.0))
