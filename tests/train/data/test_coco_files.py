"""Files of a split: names with folders and accents, byte order marks, damaged images."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from PIL import Image

from hcma_fast.errors import InputError
from hcma_fast.train.data.coco import open_image, read_split
from hcma_fast.train.data.emoji_scenes import write_coco
from hcma_fast.train.data.image_folder import ImageFolder

from coco_2014 import Document, read_2014


def test_file_names_with_folders_and_accents(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    names = ["cam0/a.jpg", "cam0\\b.jpg", f"{composed}/{decomposed}.jpg", f"{decomposed}.jpg"]
    stored = ["cam0/a.jpg", "cam0/b.jpg", f"{decomposed}/{composed}.jpg", f"{composed}.jpg"]
    for number, (name, file) in enumerate(zip(names, stored, strict=True)):
        folder = tmp_path / str(number)
        target = folder / "train2014" / file
        target.parent.mkdir(parents=True)
        target.touch()

        def change(instances: Document, captions: Document, name: str = name) -> None:
            instances["images"][1]["file_name"] = name

        _, dog = read_2014(folder, change)
        assert dog.path == target
        assert dog.path.is_file()


def test_names_that_leave_the_folder_need_a_root(tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere" / "dog.jpg"
    outside.parent.mkdir()
    outside.touch()
    for number, name in enumerate((str(outside), "../../elsewhere/dog.jpg")):
        folder = tmp_path / str(number)
        folder.mkdir()

        def change(instances: Document, captions: Document, name: str = name) -> None:
            instances["images"][1]["file_name"] = name

        with pytest.raises(InputError, match="leaves the folder of images"):
            read_2014(folder, change)
        _, dog = read_split(folder, "train2014", image_root=tmp_path)
        assert dog.path == outside
        with pytest.raises(InputError, match="leaves the folder of --root"):
            read_split(folder, "train2014", image_root=folder)
    folder = ImageFolder(tmp_path / "elsewhere")
    for name in ("", ".", "a\0b", "C:\\x.jpg", "._dog.jpg", "sub/._dog.jpg"):
        with pytest.raises(InputError):
            folder.find(name)
    assert folder.find("dog.jpg") == outside and folder.find("dog.jpg/x") is None


def test_a_byte_order_mark_is_read_and_utf_16_is_named(tmp_path: Path) -> None:
    read_2014(tmp_path)
    for name in ("instances", "captions"):
        path = tmp_path / "annotations" / f"{name}_train2014.json"
        content = path.read_bytes()
        path.write_bytes(codecs.BOM_UTF8 + content)
        assert len(read_split(tmp_path, "train2014")) == 2
        path.write_bytes(content.decode().encode("utf-16"))
        with pytest.raises(InputError, match="UTF-16"):
            read_split(tmp_path, "train2014")
        path.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "size"])
def test_images_that_cannot_be_used(tmp_path: Path, damage: str) -> None:
    write_coco(tmp_path, "val", 1)
    (example,) = read_split(tmp_path, "val")
    assert open_image(example).size == (64, 64)
    content = example.path.read_bytes()
    if damage == "size":
        Image.new("RGB", (64, 63)).save(example.path)
    else:
        broken = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image"}
        example.path.write_bytes(broken[damage])
    with pytest.raises(InputError, match="image 0") as caught:
        open_image(example)
    assert caught.value.value == str(example.path)
