"""The COCO reader: EmojiScenes and COCO 2014 come back as they were; errors name the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hcma_fast.errors import InputError
from hcma_fast.layout import Layout
from hcma_fast.train.data.coco import BadImage, CocoExample, open_image, read_split
from hcma_fast.train.data.emoji_scenes import sample_scene, write_coco

Document = dict[str, Any]


@pytest.mark.parametrize("size", [64, 48])
def test_reads_back_emoji_scenes(tmp_path: Path, size: int) -> None:
    write_coco(tmp_path, "val", 12, size)
    examples = read_split(tmp_path, "val")
    assert [example.image_id for example in examples] == list(range(12))
    for example in examples:
        scene = sample_scene("val", example.image_id, size)
        assert example.captions == scene.captions
        wanted = sorted((o.category, *(round(v * size) for v in o.box)) for o in scene.objects)
        pairs = zip(example.layout.phrases, example.layout.boxes, strict=True)
        assert sorted((name, *(round(v * size) for v in box)) for name, box in pairs) == wanted
        with Image.open(example.path) as picture:
            assert picture.size == (example.width, example.height) == (size, size)


def coco_2014() -> tuple[Document, Document]:
    """Two records as COCO 2014 has them, with all the fields that we do not read."""
    images = [
        {
            "license": 5,
            "file_name": f"COCO_train2014_{number:012d}.jpg",
            "coco_url": "http://images.cocodataset.org/train2014/x.jpg",
            "height": 480,
            "width": 640,
            "date_captured": "2013-11-14 16:28:13",
            "id": number,
        }
        for number in (57870, 9)
    ]
    segments = [[239.97, 260.24, 222.04, 270.49]]
    instances = {
        "info": {"year": 2014},
        "licenses": [],
        "images": images,
        "categories": [{"supercategory": "animal", "id": 18, "name": "dog"}],
        "annotations": [
            {"segmentation": segments, "area": 9.0, "iscrowd": 0, "image_id": 9}
            | {"bbox": [320.0, 120.0, 320.5, 240.0], "category_id": 18, "id": 1768},
            {"segmentation": {"counts": [1], "size": [480, 640]}, "area": 9.0, "iscrowd": 1}
            | {"image_id": 9, "bbox": [0, 0, 640, 480], "category_id": 18, "id": 900100},
        ],
    }
    captions = {
        "images": images,
        "annotations": [
            {"image_id": 9, "id": 787980, "caption": "A dog.\n"},
            {"image_id": 57870, "id": 787981, "caption": "An empty table."},
            {"image_id": 9, "id": 787982, "caption": "One more dog."},
        ],
    }
    return instances, captions


Change = Callable[[Document, Document], object]


def read_2014(
    folder: Path, change: Change | None = None, skipped: list[BadImage] | None = None
) -> list[CocoExample]:
    instances, captions = coco_2014()
    (folder / "train2014").mkdir()
    for image in instances["images"]:
        (folder / "train2014" / image["file_name"]).touch()
    if change is not None:
        change(instances, captions)
    (folder / "annotations").mkdir()
    for name, document in (("instances", instances), ("captions", captions)):
        (folder / "annotations" / f"{name}_train2014.json").write_text(json.dumps(document))
    return read_split(folder, "train2014", skipped=skipped)


def test_reads_coco_2014(tmp_path: Path) -> None:
    table, dog = read_2014(tmp_path)
    assert (table.image_id, table.captions) == (57870, ("An empty table.",))
    assert table.layout == Layout.empty()
    assert dog.captions == ("A dog.", "One more dog.")
    # clipped at the right edge; the crowd is left out
    assert dog.layout == Layout(["dog"], [[0.5, 0.25, 1.0, 0.75]])
    assert dog.path == tmp_path / "train2014" / "COCO_train2014_000000000009.jpg"
    assert (dog.width, dog.height) == (640, 480)


def rename(i: Document, c: Document) -> None:
    i["images"][0]["file_name"] = "other.jpg"


WRONG: dict[str, tuple[str, str, Change]] = {
    "annotation of an unknown image": (
        "annotation 1768 is of image 7",
        "instances",
        lambda i, c: i["annotations"][0].update(image_id=7),
    ),
    "caption of an unknown image": (
        "caption 787980 is of image 7",
        "captions",
        lambda i, c: c["annotations"][0].update(image_id=7),
    ),
    "image without caption": (
        "image 57870 has no caption",
        "captions",
        lambda i, c: c["annotations"].pop(1),
    ),
    "blank caption": (
        "image 57870 has no caption",
        "captions",
        lambda i, c: c["annotations"][1].update(caption=" \n"),
    ),
    "no image": (
        "this split lists no image",
        "instances",
        lambda i, c: (i["images"].clear(), i["annotations"].clear()),
    ),
    "image id twice": (
        "image id 9 occurs 2 times",
        "instances",
        lambda i, c: i["images"].append(i["images"][1]),
    ),
    "annotation id twice": (
        "annotation id 1768 occurs 2 times",
        "instances",
        lambda i, c: i["annotations"][1].update(id=1768),
    ),
    "caption id twice": (
        "caption id 787980 occurs 2 times",
        "captions",
        lambda i, c: c["annotations"][2].update(id=787980),
    ),
    "category id twice": (
        "category id 18 occurs 2 times",
        "instances",
        lambda i, c: i["categories"].append({"id": 18, "name": "cat"}),
    ),
    "unknown category": (
        "image 9: a malformed COCO annotation: KeyError 77",
        "instances",
        lambda i, c: i["annotations"][0].update(category_id=77),
    ),
    "three numbers": (
        r"annotations\.0\.bbox",
        "instances",
        lambda i, c: i["annotations"][0].update(bbox=[1, 2, 3]),
    ),
    "not a number": (
        "image 9: a malformed COCO annotation",
        "instances",
        lambda i, c: i["annotations"][0].update(bbox=[0, 0, float("nan"), 9]),
    ),
    "no size": (
        r"images\.1\.width",
        "instances",
        lambda i, c: i["images"][1].update(width=0),
    ),
    "a path as file name": (
        r"images\.1\.file_name",
        "instances",
        lambda i, c: i["images"][1].update(file_name="../secret.jpg"),
    ),
    "captions for instances": (
        "not in COCO's format: categories",
        "instances",
        lambda i, c: i.pop("categories"),
    ),
    "missing image file": ("the file of image 57870 is missing", "other.jpg", rename),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_records_are_named(tmp_path: Path, name: str) -> None:
    problem, file, change = WRONG[name]
    with pytest.raises(InputError, match=problem) as caught:
        read_2014(tmp_path, change)
    assert file in Path(str(caught.value.value)).name
    assert caught.value.remedy and caught.value.exit_code == 3


@pytest.mark.parametrize("file", ["instances", "captions"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 9999])
def test_missing_and_broken_files(tmp_path: Path, file: str, content: bytes | None) -> None:
    read_2014(tmp_path)
    path = tmp_path / "annotations" / f"{file}_train2014.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_split(tmp_path, "train2014")
    assert caught.value.value == str(path)


def test_missing_folder_of_images(tmp_path: Path) -> None:
    read_2014(tmp_path)
    (tmp_path / "train2014").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="folder of images") as caught:
        read_split(tmp_path, "train2014")
    assert caught.value.value == str(tmp_path / "train2014")


@pytest.mark.parametrize(
    ("name", "kept"),
    [("image without caption", 9), ("missing image file", 9), ("not a number", 57870)],
)
def test_bad_images_are_listed_where_that_is_asked_for(
    tmp_path: Path, name: str, kept: int
) -> None:
    problem, file, change = WRONG[name]
    skipped: list[BadImage] = []
    (example,) = read_2014(tmp_path, change, skipped)
    assert example.image_id == kept
    (bad,) = skipped
    assert bad.image_id == 9 + 57870 - kept and file in bad.path and problem in bad.why


@pytest.mark.parametrize("name", ["image id twice", "annotation of an unknown image", "no image"])
def test_a_file_that_contradicts_itself_is_never_skipped(tmp_path: Path, name: str) -> None:
    problem, _, change = WRONG[name]
    with pytest.raises(InputError, match=problem):
        read_2014(tmp_path, change, [])


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image of this split can be used"):
        read_2014(tmp_path, lambda i, c: c["annotations"].clear(), [])


def test_pycocotools_reads_the_same(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    write_coco(tmp_path, "val", 12)
    boxes = coco.COCO(tmp_path / "annotations" / "instances_val.json")
    texts = coco.COCO(tmp_path / "annotations" / "captions_val.json")
    examples = read_split(tmp_path, "val")
    assert [example.image_id for example in examples] == sorted(boxes.getImgIds())
    for example in examples:
        found = boxes.loadAnns(boxes.getAnnIds(imgIds=example.image_id, iscrowd=False))
        wanted = sorted(
            (boxes.cats[a["category_id"]]["name"], *(v / 64 for v in a["bbox"])) for a in found
        )
        pairs = zip(example.layout.phrases, example.layout.boxes, strict=True)
        assert wanted == sorted((n, x0, y0, x1 - x0, y1 - y0) for n, (x0, y0, x1, y1) in pairs)
        lines = texts.loadAnns(texts.getAnnIds(imgIds=example.image_id))
        assert tuple(line["caption"] for line in lines) == example.captions


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
