"""Only what the manifest lists is deleted, whatever the folder is called."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from engine_edits import edit

from hcma_fast.errors import InputError
from hcma_fast.export.build import _check_target, _put_in_place
from hcma_fast.export.manifest import MANIFEST_FILE
from hcma_fast.export.removal import built_files, engine_files, remove_engine


@pytest.fixture
def engine(random_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_engine, tmp_path / "engine"))


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_an_engine_folder_of_any_format_is_removed_whole(engine: Path, random_engine: Path) -> None:
    for damage in (
        lambda: None,
        lambda: edit(engine, lambda values: values.update(format=2), reseal=False),
        lambda: edit(engine, lambda values: values.pop("engine_hash"), reseal=False),
        lambda: (engine / "align.onnx").write_bytes(b"damaged"),
        (engine / "align.onnx").unlink,
    ):
        damage()
        assert MANIFEST_FILE in engine_files(engine)
        _check_target(engine, force=True)
        remove_engine(engine)
        assert not engine.exists()
        shutil.copytree(random_engine, engine)


def test_the_target_of_a_link_is_kept(engine: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(engine)
    before = everything(engine)
    with pytest.raises(InputError, match="a link"):
        remove_engine(link)
    assert everything(engine) == before and link.is_symlink()


def test_what_the_manifest_does_not_list_is_named_and_nothing_is_deleted(
    engine: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("thesis.tex", ".hidden", "notes/", "tokenizer/mine.json", "a/b/c.txt", "link"):
        mine = engine / name
        mine.parent.mkdir(parents=True, exist_ok=True)
        if name == "link":
            mine.symlink_to(tmp_path / "elsewhere")
        elif name.endswith("/"):
            mine.mkdir()
        else:
            mine.write_text("years of work")
        before = everything(engine)
        for refuse in (lambda: _check_target(engine, force=True), lambda: remove_engine(engine)):
            with pytest.raises(InputError) as caught:
                refuse()
            assert name in str(caught.value)
        assert everything(engine) == before
        if mine.is_dir() and not mine.is_symlink():
            mine.rmdir()
        else:
            mine.unlink()
        if name.startswith("a/"):
            (engine / "a" / "b").rmdir()
            (engine / "a").rmdir()


def test_a_manifest_of_something_else_makes_no_engine_folder(tmp_path: Path) -> None:
    """A web app, a browser extension, junk: the name alone decides nothing."""
    site = tmp_path / "site"
    site.mkdir()
    digest = "0" * 64
    ours = {"format": 3, "backend_version": "1", "weights_hash": "a", "key": "b", "graphs": {}}
    for content in (
        *("", "[]", "null", "[" * 10**5, "{}", '{"name": "my web app"}'),
        '{"manifest_version": 3, "name": "x", "version": "1", "files": {}}',
        json.dumps({**ours, "files": {"../other": digest}}),
        json.dumps({**ours, "files": {"/etc/passwd": digest}}),
        json.dumps({**ours, "files": {"index.html": "x"}}),
        json.dumps({**ours, "files": ["index.html"]}),
    ):
        (site / MANIFEST_FILE).write_text(content)
        (site / "index.html").write_text("hello")
        with pytest.raises(InputError, match=r"not an engine folder.*\n?.*index\.html"):
            _check_target(site, force=True)
        with pytest.raises(InputError):
            remove_engine(site)
        assert {path.name for path in site.iterdir()} == {MANIFEST_FILE, "index.html"}
    (site / MANIFEST_FILE).write_text(json.dumps({**ours, "files": {"index.html": digest}}))
    assert engine_files(site) == ["index.html", MANIFEST_FILE]


def test_what_appears_while_an_engine_is_built_is_kept(
    engine: Path, random_engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = Path(shutil.copytree(random_engine, tmp_path / "new"))
    (engine / "thesis.tex").write_text("years of work")
    _put_in_place(new, engine)
    assert not (engine / "thesis.tex").exists() and not new.exists()
    [kept] = tmp_path.glob(".engine.old-*/engine/thesis.tex")
    assert kept.read_text() == "years of work" and str(kept.parents[1]) in caplog.text


def test_half_an_engine_is_known_by_all_of_its_files(tmp_path: Path) -> None:
    half = tmp_path / "half"
    for name in (
        *("align.onnx", "weights.bin", "tokenizer/tokenizer.json", ".unet_plain.engine.12.part"),
        ".align.pt2.ab12cd_3/align.pt2",
    ):
        (half / name).parent.mkdir(parents=True, exist_ok=True)
        (half / name).write_text("")
    assert len(built_files(half)) == 5
    for name in ("photo.onnx", "align.onnx.txt", "tokenizer/notes.txt", "weights.bin/x"):
        mine = half / name
        if mine.parent.is_file():
            mine.parent.unlink()
            mine.parent.mkdir()
        mine.write_text("mine")
        with pytest.raises(InputError, match=os.path.basename(name)):
            remove_engine(half)
        mine.unlink()
    (half / "weights.bin").rmdir()
    remove_engine(half)
    assert not half.exists()
