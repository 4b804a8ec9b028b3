"""The COCO reader: EmojiScenes and COCO 2014 come back as they were; errors name the file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hcma_fast.errors import InputError
from hcma_fast.layout import Layout
from hcma_fast.train.data.coco import read_captions, read_split
from hcma_fast.train.data.coco_records import BadRecord
from hcma_fast.train.data.emoji_scenes import sample_scene, write_coco

from coco_2014 import Change, Document, read_2014


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
        "annotation 1768: category 77 cannot be used",
        "instances",
        lambda i, c: i["annotations"][0].update(category_id=77),
    ),
    "three numbers": (
        r"annotation 1768: bbox\.3 is missing",
        "instances",
        lambda i, c: i["annotations"][0].update(bbox=[1, 2, 3]),
    ),
    "not a number": (
        r"annotation 1768: bbox\.2: Input should be a finite number",
        "instances",
        lambda i, c: i["annotations"][0].update(bbox=[0, 0, float("nan"), 9]),
    ),
    "no size": (
        r"image 9: width: Input should be greater than 0",
        "instances",
        lambda i, c: i["images"][1].update(width=0),
    ),
    "a path as file name": (
        r"image 9: an image's file name is absolute or leaves",
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
    [
        *(("image without caption", 9), ("missing image file", 9)),
        *(("no size", 57870), ("a path as file name", 57870)),
    ],
)
def test_bad_images_are_listed_where_that_is_asked_for(
    tmp_path: Path, name: str, kept: int
) -> None:
    problem, file, change = WRONG[name]
    skipped: list[BadRecord] = []
    (example,) = read_2014(tmp_path, change, skipped)
    assert example.image_id == kept
    (bad,) = skipped
    assert (bad.kind, bad.id) == ("image", 9 + 57870 - kept)
    assert file in bad.path and re.search(problem, bad.why)


BIG = 10**400
BAD_BOXES: dict[str, tuple[dict[str, Any], str]] = {
    "no bbox": ({"bbox": ...}, "bbox is missing"),
    "null bbox": ({"bbox": None}, "bbox: .* tuple"),
    "empty bbox": ({"bbox": []}, "bbox.0 is missing"),
    "five numbers": ({"bbox": [1, 2, 3, 4, 5]}, "bbox: .* at most 4"),
    "text in bbox": ({"bbox": [1, 2, "3", 4]}, "bbox.2: .* number"),
    "infinite": ({"bbox": [1, 2, float("inf"), 4]}, "bbox.2: .* finite"),
    "huge": ({"bbox": [1, 2, BIG, 4]}, "bbox"),
    "negative width": ({"bbox": [34, 4, -30, 30]}, "the width or height of the box is negative"),
    "null iscrowd": ({"iscrowd": None}, "iscrowd: .* integer"),
    "null category": ({"category_id": None}, "category_id: .* integer"),
    "huge image id": ({"image_id": BIG}, "image_id: .* less than"),
}


def test_a_bad_annotation_is_listed_and_its_image_stays(tmp_path: Path) -> None:
    for number, (name, (update, problem)) in enumerate(BAD_BOXES.items()):

        def change(
            instances: Document, captions: Document, update: dict[str, Any] = update
        ) -> None:
            record = instances["annotations"][0]
            extra = {**record, "id": 5, "bbox": [0, 0, 64, 48]}
            instances["annotations"].append(extra)
            for key, value in update.items():
                record[key] = value
                if value is ...:
                    del record[key]

        folder = tmp_path / str(number)
        folder.mkdir()
        skipped: list[BadRecord] = []
        table, dog = read_2014(folder, change, skipped)
        assert (table.image_id, dog.image_id) == (57870, 9), name
        # the other box of the same image
        assert dog.layout == Layout(["dog"], [[0, 0, 0.1, 0.1]]), name
        (bad,) = skipped
        assert (bad.kind, bad.id) == ("annotation", 1768), name
        assert bad.why.startswith("annotation 1768: ") and re.search(problem, bad.why), bad.why
        assert len(bad.why) < 200, name
        with pytest.raises(InputError, match="annotation 1768: ") as caught:
            read_split(folder, "train2014")
        assert "--skip-bad" in caught.value.remedy and caught.value.exit_code == 3


def test_bad_captions_images_and_categories_are_listed(tmp_path: Path) -> None:
    def change(instances: Document, captions: Document) -> None:
        captions["annotations"][0]["caption"] = None
        captions["annotations"] += [{"image_id": 57870}, 7, {"id": 8, "image_id": 9}]
        bad = {"id": 11, "file_name": "x.jpg", "width": 64, "height": BIG}
        instances["images"] += [bad, None, {"id": 12, "file_name": 3, "width": 1, "height": 1}]
        # of an image that is left out, and of one whose id cannot be read
        for number, image in ((60, 11), (61, 77)):
            new = {"id": number, "image_id": image, "category_id": 18, "bbox": [0, 0, 9, 9]}
            instances["annotations"].append(new)
        instances["categories"] += [{"id": 19, "name": None}, {"id": 20, "name": " "}]
        new = {"id": 62, "image_id": 9, "category_id": 19, "bbox": [0, 0, 9, 9]}
        instances["annotations"].append(new)

    skipped: list[BadRecord] = []
    table, dog = read_2014(tmp_path, change, skipped)
    assert (table.captions, dog.captions) == (("An empty table.",), ("One more dog.",))
    assert dog.layout == Layout(["dog"], [[0.5, 0.25, 1.0, 0.75]])
    found = [(record.kind, record.id) for record in skipped]
    assert found == [
        *(("image", 11), ("image", None), ("image", 12)),
        *(("category", 19), ("category", 20), ("annotation", 61), ("annotation", 62)),
        *(("caption", 787980), ("caption", None), ("caption", None), ("caption", 8)),
    ]
    with pytest.raises(InputError, match=r"image 11: height: .*; 10 more cannot be used"):
        read_split(tmp_path, "train2014")
    # the captions alone, as stage 2 reads them
    with pytest.raises(InputError, match="caption 787980: caption: "):
        read_captions(tmp_path, "train2014")
    texts = read_captions(tmp_path, "train2014", skip_bad=True)
    assert texts[9] == dog.captions and texts[57870] == table.captions


def test_boxes_without_area_in_the_image_are_counted(tmp_path: Path) -> None:
    def change(instances: Document, captions: Document) -> None:
        for number, bbox in enumerate(([700, 0, 9, 9], [5, 5, 0, 9], [-20, -20, 10, 10])):
            new = {"id": number, "image_id": 9, "category_id": 18, "bbox": bbox}
            instances["annotations"].append(new)

    _, dog = read_2014(tmp_path, change)
    assert len(dog.layout) == 1 and dog.empty_boxes == 3


def test_the_issues_huge_integer(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "annotations").mkdir()
    for name, document in (
        ("instances", {"images": [{"id": 1, "file_name": "a.png", "width": 64, "height": BIG}]}),
        ("captions", {}),
    ):
        path = tmp_path / "annotations" / f"{name}_s.json"
        path.write_text(json.dumps({"categories": [], "annotations": [], **document}))
    with pytest.raises(InputError, match="image 1: height: "):
        read_split(tmp_path, "s")


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
