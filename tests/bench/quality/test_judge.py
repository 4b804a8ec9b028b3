"""The judge: its stored weights, its verdicts on real pictures, and its crops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hcma_fast.bench.quality.metrics.judge.data import (
    CLASSES,
    CROP_SIDE,
    NONE,
    JudgeCrops,
    background_box,
    cover,
    crop,
)
from hcma_fast.bench.quality.metrics.judge.model import ASSETS, Judge, held_out_accuracy
from hcma_fast.errors import WeightsError
from hcma_fast.train.data.emoji_scenes import CATEGORY_NAMES, render_scene, sample_scene


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS, tmp_path / "assets"))


def test_the_card_describes_the_stored_weights(judge: Judge) -> None:
    assert judge.card.classes == (*CATEGORY_NAMES, NONE) == CLASSES
    assert (ASSETS / "judge.safetensors").stat().st_size < 1.5e6
    assert judge.card.accuracy_clean >= 0.98
    assert judge.card.accuracy_blurred >= 0.95


@pytest.mark.parametrize(("blur", "least"), [(False, 0.95), (True, 0.9)])
def test_recognises_renders_that_it_was_not_trained_on(
    judge: Judge, blur: bool, least: float
) -> None:
    accuracy, _ = held_out_accuracy(judge, judge.card.train_scenes + 5000, 60, blur=blur)
    assert accuracy >= least


def test_sees_no_object_where_there_is_none(judge: Judge) -> None:
    grey = np.full((1, 64, 64, 3), 150, np.uint8)
    assert [v.category for v in judge.predict(grey, [[(0.2, 0.2, 0.8, 0.8)]])[0]] == [NONE]


def test_is_not_content_with_a_blob(judge: Judge) -> None:
    pictures, boxes, wanted = [], [], []
    for index in range(9000, 9040):
        scene = sample_scene("judge", index)
        item = scene.objects[0]
        x0, y0, x1, y1 = (round(v * 64) for v in item.box)
        picture = render_scene(scene, "judge", index)
        blob = picture.crop((x0, y0, x1, y1)).resize((2, 2), Image.Resampling.BOX)
        picture.paste(blob.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC), (x0, y0))
        pictures.append(np.asarray(picture))
        boxes.append([item.box])
        wanted.append(item.category)
    verdicts = judge.predict(np.stack(pictures), boxes)
    fooled = [name for name, (v,) in zip(wanted, verdicts, strict=True) if v.category == name]
    assert len(fooled) <= 0.2 * len(wanted)


def test_each_box_has_the_log_probability_of_its_own_category(judge: Judge) -> None:
    values = torch.full((3, len(judge.card.classes)), -50.0)
    dog, cat = (judge.card.classes.index(name) for name in ("dog", "cat"))
    values[0, dog], values[1, dog], values[2, cat] = -0.1, -0.2, -0.3
    found = judge.of_categories(values, ["dog", "cat", "cat"])
    np.testing.assert_allclose(found, [-0.1, -50, -0.3], rtol=1e-6)
    assert judge.of_categories(values[:0], []).shape == (0,)
    assert [seen.category for seen in judge.verdicts([values])[0]] == ["dog", "dog", "cat"]


def test_is_deterministic_and_independent_of_the_batch(judge: Judge) -> None:
    scenes = [sample_scene("judge", index) for index in range(8000, 8004)]
    pictures = np.stack(
        [np.asarray(render_scene(s, "judge", i)) for i, s in enumerate(scenes, 8000)]
    )
    boxes = [[item.box for item in scene.objects] for scene in scenes]
    first = judge.predict(pictures, boxes)
    assert first == Judge.load().predict(pictures, boxes)
    assert [len(some) for some in first] == [len(some) for some in boxes]
    for i in range(4):
        (alone,) = judge.predict(pictures[i : i + 1], boxes[i : i + 1])
        assert [v.category for v in alone] == [v.category for v in first[i]]
        assert [v.probability for v in alone] == pytest.approx([v.probability for v in first[i]])
    assert judge.predict(pictures[:2], [[], []]) == [[], []]
    # and probabilities are those of the verdicts, image by image
    for some, values in zip(first, judge.log_probabilities(pictures, boxes), strict=True):
        assert values.shape == (len(some), len(judge.card.classes))
        assert torch.allclose(values.exp().sum(-1), torch.ones(len(some)))
        for verdict, own in zip(some, values, strict=True):
            assert judge.card.classes[int(own.argmax())] == verdict.category
            assert float(own.max().exp()) == pytest.approx(verdict.probability)


def test_refuses_a_flipped_byte(copy: Path) -> None:
    path = copy / "judge.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="not the ones of its card"):
        Judge.load(copy)


def test_refuses_missing_files_and_a_card_of_other_classes(copy: Path) -> None:
    card = json.loads((copy / "judge.json").read_text())
    (copy / "judge.json").write_text(json.dumps({**card, "classes": card["classes"][:5]}))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        Judge.load(copy)
    (copy / "judge.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        Judge.load(copy)
    (copy / "judge.json").unlink()
    with pytest.raises(WeightsError, match=r"judge\.json"):
        Judge.load(copy)


def test_a_crop_shows_the_box_with_its_margin_at_any_image_size() -> None:
    for side in (16, 64, 512):
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[side // 4 : side // 2, side // 4 : side // 2] = 255
        piece = crop(Image.fromarray(pixels), (0.25, 0.25, 0.5, 0.5))
        assert piece.shape == (CROP_SIDE, CROP_SIDE, 3)
        assert piece[16, 16].min() == 255
        assert piece[0, 0].max() < 128
    whole = crop(Image.fromarray(pixels), (0.0, 0.0, 1.0, 1.0))
    assert whole[12, 12].min() == 255 and whole[24, 24].max() == 0


def test_a_crop_of_a_sliver_is_not_empty() -> None:
    image = Image.new("RGB", (64, 64), "red")
    for box in ((0.5, 0.5, 0.5001, 0.5001), (0.999, 0.0, 1.0, 1.0)):
        assert (crop(image, box) == (255, 0, 0)).all()


def test_background_boxes_show_background() -> None:
    scene = sample_scene("judge", 3)
    box = background_box(np.random.default_rng(0), scene)
    boxes = [item.box for item in scene.objects]
    assert box is not None and cover(box, boxes) < 0.15
    assert cover(boxes[0], boxes) >= 1


def test_training_batches_depend_on_the_step_alone() -> None:
    pictures = np.stack(
        [np.asarray(render_scene(sample_scene("judge", i), "judge", i)) for i in range(12)]
    )
    data = JudgeCrops(pictures)
    crops, labels = data.batch(3, 64)
    again, same = JudgeCrops(pictures).batch(3, 64)
    assert torch.equal(crops, again) and torch.equal(labels, same)
    assert not torch.equal(crops, data.batch(4, 64)[0])
    assert crops.shape == (64, 3, CROP_SIDE, CROP_SIDE)
    assert crops.min() >= 0 and crops.max() <= 1
    shown = {CLASSES[label] for label in labels.tolist()}
    drawn = {item.category for scene in data.scenes for item in scene.objects}
    assert NONE in shown and shown <= drawn | {NONE}
