"""GLIGEN's protocol on COCO: crops as in its code, files for its scorers, and scores back."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hcma_fast.bench.quality.generate import RunSettings
from hcma_fast.bench.quality.items import items_hash
from hcma_fast.bench.quality.protocols.gligen_coco import MAX_BOXES, GligenCoco
from hcma_fast.errors import HcmaError, InputError

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}]


def write_coco(folder: Path, boxes: dict[int, list[list[float]]], split: str = "val2014") -> Path:
    """Images of 80 x 60 pixels with these boxes, as COCO 2014 has them."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations, captions = [], [], []
    for number, some in boxes.items():
        name = f"COCO_{split}_{number:012d}.jpg"
        Image.new("RGB", (80, 60), (number % 256, 0, 0)).save(folder / split / name)
        images.append({"id": number, "file_name": name, "width": 80, "height": 60, "license": 3})
        captions.append({"id": number, "image_id": number, "caption": f" Picture {number}. "})
        annotations += [
            {
                "id": 1000 * number + index,
                "image_id": number,
                "category_id": (18, 90)[index % 2],
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "segmentation": [],
                "iscrowd": 0,
            }
            for index, bbox in enumerate(some)
        ]
    instances = {"images": images, "categories": CATEGORIES, "annotations": annotations}
    for kind, document in (
        ("instances", instances),
        ("captions", {"images": images, "annotations": captions}),
    ):
        (folder / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(document))
    return folder


#: the square in the middle of 80 x 60 is x from 10 to 70
BOXES = {
    391895: [[10, 0, 30, 60], [40, 30, 40, 30], [0, 0, 12, 60], [0, 0, 4, 4]],
    42: [[10 + 6 * i, 0, 6 + i, 30] for i in range(9)],
}


def test_boxes_are_those_of_the_square_in_the_middle(tmp_path: Path) -> None:
    benchmark = GligenCoco.read(write_coco(tmp_path, BOXES), None)
    first, second = benchmark.items
    assert (first.id, first.prompt) == ("391895", "Picture 391895.")
    # the largest first; of the third 2 of 12 columns are left, 3%; the fourth is outside
    assert first.layout.boxes == ((0, 0, 0.5, 1), (0.5, 0.5, 1, 1), (0, 0, 2 / 60, 1))
    assert first.layout.phrases == ("dog", "toothbrush", "dog")
    assert len(second.layout) == MAX_BOXES
    real = first.real_image(64, 64, resize=False)
    assert real.size == (64, 64)
    with pytest.raises(InputError, match="another size"):
        first.real_image(64, 32, resize=True)
    # how the real image is read does not make another run
    plain = [item.model_copy(update={"crop": False}) for item in benchmark.items]
    assert items_hash(plain) == items_hash(benchmark.items)
    assert len(GligenCoco.read(tmp_path, 1).items) == 1


def test_cocos_own_scorer_reads_the_annotations_and_agrees_on_ap(
    tmp_path: Path, run_of: Callable[[int], RunSettings]
) -> None:
    benchmark = GligenCoco.read(write_coco(tmp_path, BOXES), None)
    run = run_of(2)
    benchmark.export([], run, tmp_path, tmp_path / "out", force=False)
    truth = tmp_path / "out" / "instances_fake.json"
    names = {path.name for path in (tmp_path / "out" / "real").iterdir()}
    assert names == {"391895.png", "42.png"}
    found = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9 - 0.01 * i}
        for i, a in enumerate(json.loads(truth.read_text())["annotations"])
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(found))
    exact = benchmark.read_scores(results, run).values
    assert exact["AP (COCO results)"] == pytest.approx(1)

    # half of the boxes, each moved by a tenth of its width, and one of an object not asked for
    moved = [
        {**entry, "bbox": [entry["bbox"][0] + 0.1 * entry["bbox"][2], *entry["bbox"][1:]]}
        for entry in found[::2]
    ]
    moved.append({**found[0], "category_id": 90, "score": 0.99})
    results.write_text(json.dumps(moved))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(str(truth))
        scorer = COCOeval(expected, expected.loadRes(str(results)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    ours = benchmark.read_scores(results, run).values
    assert 0 < ours["AP (COCO results)"] < 1
    assert ours["AP (COCO results)"] == pytest.approx(scorer.stats[0], abs=1e-6)
    assert ours["AP50 (COCO results)"] == pytest.approx(scorer.stats[1], abs=1e-6)


def test_reads_what_pytorch_fid_prints(
    tmp_path: Path, run_of: Callable[[int], RunSettings]
) -> None:
    benchmark = GligenCoco([], {18: "dog"}, "val2014")
    path = tmp_path / "fid.txt"
    path.write_text("100%|###| 600/600\nFID:  21.0412345\n")
    assert benchmark.read_scores(path, run_of(1)).values == {"FID (pytorch-fid)": 21.0412345}
    path.write_text("FID:  nan\n")
    with pytest.raises(InputError, match="no finite number"):
        benchmark.read_scores(path, run_of(1))


@given(st.binary(max_size=60))
def test_whatever_a_result_holds_the_error_is_typed(
    tmp_path_factory: pytest.TempPathFactory, run_of: Callable[[int], RunSettings], content: bytes
) -> None:
    path = tmp_path_factory.mktemp("gligen") / "results.json"
    path.write_bytes(content)
    with contextlib.suppress(HcmaError):
        GligenCoco([], {}, "val2014").read_scores(path, run_of(0))


ENTRY: dict[str, Any] = {"image_id": 42, "category_id": 18, "bbox": [1, 1, 9, 9], "score": 0.5}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**ENTRY, "image_id": 7}, "image_id is not of this run"),
        ({**ENTRY, "category_id": 1}, "category_id is not one of COCO's"),
        ({**ENTRY, "score": 2}, "score"),
        ({**ENTRY, "bbox": [1, 1, 9]}, "bbox"),
        ({"image_id": 42}, "category_id"),
    ],
)
def test_bad_results_say_what_is_wrong(
    tmp_path: Path, run_of: Callable[[int], RunSettings], entry: dict[str, Any], message: str
) -> None:
    benchmark = GligenCoco.read(write_coco(tmp_path, BOXES), None)
    path = tmp_path / "results.json"
    path.write_text(json.dumps([ENTRY, entry]))
    with pytest.raises(InputError, match=message):
        benchmark.read_scores(path, run_of(2))


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither val2014 nor val2017"):
        GligenCoco.read(tmp_path, None)
    write_coco(tmp_path, BOXES, "val2017")
    with pytest.raises(InputError, match="there are fewer"):
        GligenCoco.read(tmp_path, 3)
    assert "val2017" in GligenCoco.read(tmp_path, 2).title
