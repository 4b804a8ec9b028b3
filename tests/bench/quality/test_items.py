"""Manifests and COCO's files: what layouts and real images an evaluation reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hcma_fast.bench.quality.items import (
    coco_items,
    read_items,
)
from hcma_fast.errors import InputError
from hcma_fast.layout import Layout


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


LINE = {"id": "a", "prompt": "a dog", "phrases": ["dog"], "boxes": [[0.1, 0.1, 0.5, 0.9]]}


def test_manifest_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "dog.png")
    path = write(tmp_path / "m.jsonl", {**LINE, "image": "dog.png", "mentions": ["dog"]})
    (item,) = read_items(path)
    assert item.layout == Layout(["dog"], [(0.1, 0.1, 0.5, 0.9)]) and item.mentions == ("dog",)
    assert item.real_image(64, 64, resize=False).size == (64, 64)
    with pytest.raises(InputError, match="another size"):
        item.real_image(32, 32, resize=False)
    assert item.real_image(32, 32, resize=True).size == (32, 32)
    (tmp_path / "dog.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot read the real image of a"):
        item.real_image(64, 64, resize=False)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no lines"),
        ([{**LINE, "id": "a/b"}], "file name"),
        ([LINE, {**LINE, "id": "A"}], "twice"),
        ([{k: v for k, v in LINE.items() if k != "id"}], "line 1: id"),
        ([LINE, {**LINE, "id": "b", "boxes": [[0.5, 0.1, 0.4, 0.9]]}], "line 2: box 0"),
        ([{**LINE, "mentions": ["dog", "cat"]}], "mentions"),
        ([{**LINE, "image": "lost.png"}], "1 real images are missing"),
        ([{**LINE, "colour": "red"}], "line 1: colour"),
    ],
)
def test_bad_manifests_are_refused(
    lines: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read_items(write(tmp_path / "m.jsonl", *lines))


def test_unequal_counts_of_real_images_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "dog.png")
    path = write(tmp_path / "m.jsonl", {**LINE, "image": "dog.png"}, {**LINE, "id": "b"})
    with pytest.raises(InputError, match="counts of real and generated ones differ"):
        read_items(path)
    with pytest.raises(InputError, match="cannot read the manifest"):
        read_items(tmp_path / "none.jsonl")


def test_coco_protocol_reads_the_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "annotations").mkdir()
    name = "COCO_val2014_000000000042.jpg"
    Image.new("RGB", (640, 480)).save(tmp_path / "val2014" / name)
    image = {"id": 42, "file_name": name, "width": 640, "height": 480}
    box = {"id": 1, "image_id": 42, "category_id": 18, "bbox": [64, 48, 320, 240], "iscrowd": 0}
    instances = {
        "images": [image],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [box],
    }
    captions = {"images": [image], "annotations": [{"id": 7, "image_id": 42, "caption": "A dog."}]}
    for kind, content in (("instances", instances), ("captions", captions)):
        (tmp_path / "annotations" / f"{kind}_val2014.json").write_text(json.dumps(content))
    (item,) = coco_items(tmp_path, 1)
    assert item.id == "000000000042" and item.prompt == "A dog."
    assert item.layout == Layout(["dog"], [(0.1, 0.1, 0.6, 0.6)])
    assert item.real_image(512, 512, resize=True).size == (512, 512)
    with pytest.raises(InputError, match="fewer"):
        coco_items(tmp_path, 2)


def test_names_of_real_images_stay_in_the_manifests_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    manifest, picture = tmp_path / "run" / "m.jsonl", tmp_path / "real.png"
    Image.new("RGB", (4, 4)).save(picture)
    for name in ("../real.png", str(picture)):
        manifest.write_text(json.dumps({"id": "x", "prompt": "a", "image": name}))
        with pytest.raises(InputError, match="line 1: an image's file name is absolute or leaves"):
            read_items(manifest)
        assert read_items(manifest, image_root=tmp_path)[0].image == picture
    manifest.write_text("\ufeff" + json.dumps({"id": "x", "prompt": "a", "image": "x" * 5000}))
    with pytest.raises(InputError, match="real images are missing"):
        read_items(manifest)
