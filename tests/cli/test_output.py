"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hcma_fast.cli.output import BuildProgress, output_folder
from hcma_fast.errors import OutputError
from hcma_fast.files import write_file


def test_write_file_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failed_write_keeps_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "a.bin"
    write_file(path, b"old")

    def fsync(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fsync)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_output_folder_is_made_and_left_clean(tmp_path: Path) -> None:
    with output_folder(tmp_path / "a" / "b") as folder:
        assert os.listdir(folder) == []
    assert folder.is_dir()


def _fail_in(folder: Path, error: BaseException, *, after_writing: bool) -> None:
    with output_folder(folder):
        if after_writing:
            write_file(folder / "image.png", b"1")
        raise error


def test_a_failure_takes_empty_new_folders_away_but_no_files(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt):
        _fail_in(folder, KeyboardInterrupt(), after_writing=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="x"):
        _fail_in(folder, ValueError("x"), after_writing=True)
    assert os.listdir(folder) == ["image.png"]


@pytest.mark.parametrize("below", ["file", "file/deeper", "/proc/nowhere"])
def test_an_unwritable_folder_is_an_error_with_its_path(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot read or write") as caught:
        output_folder(tmp_path / below).__enter__()
    assert caught.value.exit_code == 3
    assert caught.value.value == str(tmp_path / below)


def test_build_progress_is_silent_until_something_is_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with BuildProgress("Building.") as progress:
        assert not progress.started
    assert capsys.readouterr().err == ""
    with BuildProgress("Building.") as progress:
        progress("align", "export")
        progress("align", "done")
        assert progress.started
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["Building.", "align: export", "align: done"]
    assert captured.out == ""
