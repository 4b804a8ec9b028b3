"""A small split as COCO 2014 has it, for tests that change a record of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hcma_fast.train.data.coco import CocoExample, read_split
from hcma_fast.train.data.coco_records import BadRecord

Document = dict[str, Any]


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
    folder: Path, change: Change | None = None, skipped: list[BadRecord] | None = None
) -> list[CocoExample]:
    instances, captions = coco_2014()
    (folder / "train2014").mkdir(exist_ok=True)
    for image in instances["images"]:
        (folder / "train2014" / image["file_name"]).touch()
    if change is not None:
        change(instances, captions)
    (folder / "annotations").mkdir()
    for name, document in (("instances", instances), ("captions", captions)):
        (folder / "annotations" / f"{name}_train2014.json").write_text(json.dumps(document))
    return read_split(folder, "train2014", skipped=skipped)
