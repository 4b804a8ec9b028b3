"""Folders of files that are each written whole or not at all."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcma_fast.errors import InputError, OutputError, WeightsError
from hcma_fast.files import is_file, parse_json, read_file, read_json, write_folder


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


def test_reading_names_what_is_no_file_too_large_or_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    os.mkfifo(tmp_path / "pipe")
    for bad, words in {
        tmp_path / "pipe": "must be a file",
        Path("/dev/zero"): "must be a file",
        Path("/dev/null"): "must be a file",
        tmp_path: "Is a directory",
        tmp_path / "none": "No such file",
        tmp_path / ("x" * 5000): "File name too long",
        tmp_path / "a\0b": "null byte",
    }.items():
        with pytest.raises(InputError, match=words):
            read_file(bad, "the layout")
        assert not is_file(bad)
    path.write_bytes(b"x" * 2**20 + b"y")
    with pytest.raises(InputError, match="the layout has more than 1 MiB"):
        read_file(path, "the layout", limit=2**20)
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes('{"é": 1}'.encode(encoding))
        assert read_json(path, "the layout") == {"é": 1}
    for encoding, name in {
        "utf-16": "UTF-16",
        "utf-16-le": "UTF-16",
        "utf-16-be": "UTF-16",
        "utf-32": "UTF-32",
        "latin-1": r"not valid UTF-8 \(line 1\)",
    }.items():
        path.write_bytes('{"é": 1}'.encode(encoding))
        with pytest.raises(InputError, match=f"the layout is {name}") as caught:
            read_json(path, "the layout")
        assert "Out-File -Encoding utf8" in caught.value.remedy


def test_json_is_strict() -> None:
    assert parse_json('{"a": [1, -2.5, "\\u00e9", null, true]}', "line 1") == {
        "a": [1, -2.5, "é", None, True]
    }
    assert parse_json("[" * 64 + "]" * 64, "line 1") is not None
    for text, words in {
        "{": "line 1 must be JSON",
        '{"a": 1, "a": 2}': "the key 'a' is there twice",
        "[NaN]": "NaN is not finite",
        "[-Infinity]": "not finite",
        "[1e999]": "not finite",
        "9" * 41: "41 digits",
        "9" * 10**5: "100000 digits",
        "[" * 65 + "]" * 65: "nests more than 64 levels",
        "[" * 10**5: "nests more than 64 levels",
        '{"a":' * 900 + "1" + "}" * 900: "nests more than 64 levels",
    }.items():
        with pytest.raises(InputError, match=words):
            parse_json(text, "line 1")
    with pytest.raises(WeightsError, match="must be JSON"):
        parse_json(b"{", "the config", kind=WeightsError)
