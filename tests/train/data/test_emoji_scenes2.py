"""EmojiScenes, second edition: its art, colours, captions and boxes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hcma_fast.errors import InputError
from hcma_fast.train.data.coco import read_split
from hcma_fast.train.data.editions import EDITIONS
from hcma_fast.train.data.emoji_scenes import ASSETS, CATEGORIES, SPLITS, Scene, Split, write_coco
from hcma_fast.train.data.emoji_scenes2 import (
    BACKGROUNDS,
    CATEGORY_NAMES,
    COCO_IDS,
    COLOURS,
    HELD_OUT_PAIRS,
    LOOKS,
    PHRASES,
    PLURALS,
    SECOND,
    SHEET_COLUMNS,
    SPRITE_SIDE,
    ColouredObject,
    outlined,
    render_scene,
    sample_scene,
    sprites,
)
from hcma_fast.train.data.emoji_scenes2 import CATEGORIES as CATEGORIES2
from hcma_fast.train.data.make_sprites2 import draw_sheet, recoloured, shade

#: ids of the categories that the first edition has not, from COCO's own list
NEW_COCO_IDS = {
    "train": 7, "truck": 8, "traffic light": 10, "horse": 19, "backpack": 27, "suitcase": 33,
    "kite": 38, "cake": 61, "chair": 62, "couch": 63, "potted plant": 64, "book": 84,
}  # fmt: skip
TRAIN_SHA256 = "6af679cfb6303d86e807ff5473bda9af677fc2edc13bcd1a93abecb11a316ccb"
COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
SCENES = {split: [sample_scene(split, i) for i in range(150)] for split in SPLITS}
ALL = [scene for scenes in SCENES.values() for scene in scenes]


def pixels(scene: Scene, split: Split, index: int) -> NDArray[np.int16]:
    return np.asarray(render_scene(scene, split, index)).astype(np.int16)


def test_categories_are_cocos_and_those_of_the_first_edition_and_more() -> None:
    ids = {c.name: c.id for c in CATEGORIES2}
    assert ids == {c.name: c.id for c in CATEGORIES} | NEW_COCO_IDS
    assert len(ids) == len(set(ids.values())) == 36
    assert sum(bool(c.colours) for c in CATEGORIES2) == 12
    assert len(set(COCO_IDS.values())) == len(COCO_IDS) == len(PHRASES) == len(LOOKS)
    assert (COCO_IDS["car"], COCO_IDS["red car"], COCO_IDS["pink clock"]) == (3, 103, 685)
    assert PLURALS["blue bus"] == "blue buses" and PLURALS["sheep"] == "sheep"
    # a colour that is a category too would be ambiguous
    assert not set(COLOURS) & set(CATEGORY_NAMES)


def test_the_sheet_holds_a_whole_figure_for_each_look() -> None:
    with Image.open(ASSETS / "sprites2.png") as sheet:
        rows = -(-len(LOOKS) // SHEET_COLUMNS)
        assert sheet.size == (SHEET_COLUMNS * SPRITE_SIDE, rows * SPRITE_SIDE)
    for look, art in sprites().items():
        assert max(art.size) == SPRITE_SIDE and min(art.size) > SPRITE_SIDE / 4, look
        assert 0.2 < (np.asarray(art)[..., 3] > 128).mean() <= 1, look
    assert "MIT License" in (ASSETS / "LICENSE-sprites2.txt").read_text()


def test_looks_differ_and_coloured_ones_have_the_colour() -> None:
    drawn = {}
    for look, art in sprites().items():
        drawn[look] = np.asarray(art.resize((32, 32)).convert("RGBa").convert("RGBA")).astype(float)
    for first, second in combinations(LOOKS, 2):
        difference = np.abs(drawn[first] - drawn[second]).mean()
        # a natural look may have the colour of one that is named: a car is red
        natural = first[0] == second[0] and None in (first[1], second[1])
        assert difference > (0 if natural else 2), (first, second)
    for (name, colour), art in sprites().items():
        if colour:
            solid = np.asarray(art)
            shown = solid[solid[..., 3] > 200][:, :3].astype(float)
            near = np.abs(shown - np.array(COLOURS[colour])).max(-1) < 60
            assert near.mean() > 0.1, (name, colour, near.mean())


def test_scenes_are_a_function_of_split_and_index_and_stay_as_they_are() -> None:
    assert sample_scene("val", 7) == sample_scene("val", 7)
    assert np.array_equal(*(pixels(sample_scene("val", 7), "val", 7) for _ in range(2)))
    drawn = repr([sample_scene("train", i) for i in range(50)])
    assert hashlib.sha256(drawn.encode()).hexdigest() == TRAIN_SHA256
    objects = [repr(scene.objects) for scene in ALL]
    assert len(set(objects)) == len(objects)


def test_variety() -> None:
    assert {len(scene.objects) for scene in ALL} == {1, 2, 3, 4, 5}
    assert {scene.background for scene in ALL} == set(BACKGROUNDS)
    named = Counter(o.phrase for scene in ALL for o in scene.objects)
    assert {o.category for scene in ALL for o in scene.objects} == set(CATEGORY_NAMES)
    assert len(named) > 0.9 * len(PHRASES)
    mixed = [
        scene
        for scene in ALL
        if len({o.phrase for o in scene.objects}) > len({o.category for o in scene.objects})
    ]
    assert len(mixed) > 10, "no scene has two colours of one category"
    sides = [max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for s in ALL for o in s.objects]
    assert min(sides) < 0.2 and max(sides) > 0.75


def test_boxes_are_tight_around_what_is_drawn_and_overlap_little() -> None:
    size = SECOND.image_size
    for index, scene in enumerate(SCENES["train"][:60]):
        empty = pixels(Scene(scene.captions, scene.background, ()), "train", index)
        changed = np.abs(pixels(scene, "train", index) - empty).max(axis=-1) > 0
        outside = np.ones_like(changed)
        boxes = np.array([item.box for item in scene.objects]) * size
        assert np.abs(boxes - boxes.round()).max() < 1e-9
        assert boxes.min() >= 0 and boxes.max() <= size
        for x0, y0, x1, y1 in boxes.round().astype(int):
            outside[y0:y1, x0:x1] = False
        assert not changed[outside].any()
        for a, b in combinations(boxes, 2):
            shared = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            areas = [np.prod(box[2:] - box[:2]) for box in (a, b)]
            assert np.prod(shared.clip(min=0)) <= 0.1 * min(areas)
        if len(boxes) == 1:
            rows, columns = np.nonzero(changed)
            drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.array(drawn) - boxes[0]).max() <= 2, (index, scene)


def test_figures_are_never_mirrored_and_have_an_outline() -> None:
    box = (0.25, 0.25, 0.75, 0.75)
    one = Scene(("",), "in front of a white wall", (ColouredObject("horse", box),))
    shapes = [pixels(one, "train", i)[32:96, 32:96].min(-1) < 120 for i in range(8)]
    assert all((shape == shapes[0]).mean() > 0.99 for shape in shapes)
    for side in (12, 64):
        figure = np.asarray(outlined(sprites()["sheep", None], side, side))
        solid = figure[..., 3] > 200
        edge = solid & ~np.pad(solid, 1)[2:, 1:-1] | solid & ~np.pad(solid, 1)[:-2, 1:-1]
        assert figure[edge][:, :3].mean() < 110, side
        assert figure.shape == (side, side, 4)


def counted(caption: str) -> Counter[str]:
    """The objects that a caption names, read with its grammar."""
    names = {plural: phrase for phrase, plural in PLURALS.items()} | {p: p for p in PHRASES}
    longest_first = "|".join(sorted(names, key=len, reverse=True))
    text = re.sub(rf" ({'|'.join(BACKGROUNDS)})$", "", caption).removeprefix("a picture of ")
    found = re.findall(rf"\b({'|'.join(COUNTS)}) ({longest_first})\b", text)
    return Counter({names[noun]: COUNTS[number] for number, noun in found})


def test_captions_name_counts_colours_and_background() -> None:
    for scene in ALL:
        for caption in scene.captions:
            assert caption.endswith(f" {scene.background}")
            assert counted(caption) == Counter(o.phrase for o in scene.objects), caption


def test_held_out_pairs_are_in_the_test_split_only() -> None:
    assert len(HELD_OUT_PAIRS) == 70
    for split in SPLITS:
        held_out = sum(
            any(
                frozenset(pair) in HELD_OUT_PAIRS
                for pair in combinations({o.category for o in scene.objects}, 2)
            )
            for scene in SCENES[split]
        )
        assert held_out > 20 if split == "test" else held_out == 0


def test_is_written_in_cocos_format(tmp_path: Path) -> None:
    write_coco(tmp_path, "val", 8, 128, SECOND)
    found = read_split(tmp_path, "val")
    for index, example in enumerate(found):
        scene = sample_scene("val", index)
        assert (example.width, example.height) == (128, 128)
        # the reader sorts boxes by size
        assert Counter(example.layout.phrases) == Counter(o.phrase for o in scene.objects)
        assert set(example.layout.boxes) == {o.box for o in scene.objects}
        assert example.captions == scene.captions
    text = (tmp_path / "annotations" / "instances_val.json").read_text()
    assert {c["name"]: c["id"] for c in json.loads(text)["categories"]} == COCO_IDS
    assert json.loads(text)["info"]["version"] == "2"


def test_editions_are_known_by_their_numbers() -> None:
    assert {n: (e.number, e.image_size, len(e.phrases)) for n, e in EDITIONS.items()} == {
        1: (1, 64, 24),
        2: (2, 128, len(PHRASES)),
    }


def test_colours_replace_fills_all_at_once() -> None:
    assert shade((100, 200, 40), 1) == "#64c828" and shade((100, 200, 40), 0.5) == "#326414"
    assert shade((0, 0, 255), 2**0.5) == "#8080ff"
    body = '<path fill="#f8312f" d="M0"/><path fill="#ca0b4a" d="M1"/>'
    assert recoloured(body, "backpack", None) == body
    assert recoloured(body, "backpack", "blue") == body.replace("#f8312f", "#2474f0").replace(
        "#ca0b4a", shade(COLOURS["blue"], 0.7)
    )
    lamp = '<path fill="#9b9b9b" d="M0"/><path fill="#3f5fff" d="M1"/>'
    assert recoloured(lamp, "couch", None) == '<path fill="#3f5fff" d="M1"/>'


def test_says_where_icons_are_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the icons") as caught:
        draw_sheet(tmp_path)
    assert "npm install @iconify-json/fluent-emoji-flat" in caught.value.remedy
