"""Files that are opened once: names may change, content may not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from hcma_fast.errors import InputError
from hcma_fast.opened import OpenedFile, private_folder


def lose(path: Path, how: str) -> None:
    """What may happen to a name while the file is open."""
    if how == "replaced":
        other = path.with_name("other")
        other.write_bytes(b"other")
        other.replace(path)
    elif how == "removed":
        path.unlink()


@pytest.mark.parametrize("how", ["kept", "replaced", "removed"])
@pytest.mark.parametrize("size", [0, 100, 2**24 + 1])
def test_what_was_opened_is_what_is_read(tmp_path: Path, how: str, size: int) -> None:
    content = (b"0123456789" * (size // 10 + 1))[:size]
    path = tmp_path / "file"
    path.write_bytes(content)
    file = OpenedFile(path)
    lose(path, how)
    assert file.sha256 == hashlib.sha256(content).hexdigest() and file.size == size
    assert file.content == content and file.memory.tobytes() == content
    assert file.has_name == (how == "kept")
    for plain in (False, True):
        with file.named(plain=plain) as named:
            assert named.read_bytes() == content
            assert not (plain and named.is_symlink())
        with private_folder({"a/b.bin": file}, plain=plain) as folder:
            assert (folder / "a" / "b.bin").read_bytes() == content
        assert not folder.exists()
    if how == "replaced":
        assert path.read_bytes() == b"other"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    assert OpenedFile(tmp_path / "link").content == b"x"
    for name, follow in (("link", False), ("fifo", True), ("", True), ("absent", True)):
        before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        with pytest.raises(OSError, match=r"regular|symbolic|No such|directory"):
            OpenedFile(tmp_path / name, follow=follow)
        after = len(os.listdir("/proc/self/fd")) if before else 0
        assert after == before, "a descriptor was left open"


def test_errors_name_the_folder_that_the_files_came_from(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    files = {"part/file": OpenedFile(tmp_path / "file")}
    with (
        pytest.raises(InputError) as caught,
        private_folder(files, origin=Path("/model")) as folder,
    ):
        raise InputError(f"bad {folder}/part", value=str(folder / "part" / "file"), remedy="Mend.")
    assert (caught.value.what, caught.value.value) == ("bad /model/part", "/model/part/file")
