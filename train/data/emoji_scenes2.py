"""EmojiScenes, second edition: 128 pixels, 36 categories, twelve of them in several colours.

Whole figures in flat colours with a dark outline, never mirrored: a phrase has one look. A phrase
without a colour ("car") means the category's natural look. ``assets/sprites2.png`` holds the art
(Fluent Emoji and Noto Emoji, assets/LICENSE-sprites2.txt), made by :mod:`make_sprites2`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from hcma_fast.program import run_program
from hcma_fast.train.data.emoji_scenes import (
    ASSETS,
    Category,
    Edition,
    Scene,
    SceneObject,
    Split,
    gradient,
    main,
    split_rng,
    write_captions,
)
from hcma_fast.train.data.scene_sampling import choose_categories, held_out_pairs, place

IMAGE_SIZE = 128
SPRITE_SIDE = 128
SHEET_COLUMNS = 12
MAX_OBJECTS = 5
OUTLINE = (40, 30, 44)

#: the colours that phrases name; none is called orange, which is a category
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (232, 44, 44),
    "yellow": (255, 208, 40),
    "green": (36, 178, 76),
    "blue": (36, 116, 240),
    "purple": (134, 70, 196),
    "pink": (255, 128, 190),
}
_ALL = tuple(COLOURS)


@dataclass(frozen=True)
class ColourCategory(Category):
    """A category and the colours in which its phrases name it, beside its natural look."""

    colours: tuple[str, ...] = ()


def _category(
    number: int, name: str, glyph: str, plural: str = "", colours: tuple[str, ...] = ()
) -> ColourCategory:
    return ColourCategory(number, name, plural or f"{name}s", glyph, colours=colours)


#: glyph: the icon of @iconify-json/fluent-emoji-flat, or of @iconify-json/noto after "noto:"
CATEGORIES: tuple[ColourCategory, ...] = (
    _category(3, "car", "automobile", colours=_ALL),
    _category(5, "airplane", "airplane"),
    _category(6, "bus", "bus", "buses", _ALL),
    _category(7, "train", "locomotive"),
    _category(8, "truck", "delivery-truck", colours=_ALL),
    _category(9, "boat", "sailboat", colours=_ALL),
    _category(10, "traffic light", "vertical-traffic-light"),
    _category(13, "stop sign", "stop-sign"),
    _category(16, "bird", "noto:bird"),
    _category(17, "cat", "cat"),
    _category(18, "dog", "noto:dog"),
    _category(19, "horse", "horse"),
    _category(20, "sheep", "noto:ewe", "sheep"),
    _category(21, "cow", "noto:cow"),
    _category(22, "elephant", "elephant"),
    _category(23, "bear", "bear"),
    _category(24, "zebra", "zebra"),
    _category(25, "giraffe", "giraffe"),
    _category(27, "backpack", "backpack", colours=_ALL),
    _category(28, "umbrella", "umbrella", colours=_ALL),
    _category(33, "suitcase", "luggage", colours=_ALL),
    _category(37, "sports ball", "noto:soccer-ball"),
    _category(38, "kite", "kite"),
    _category(52, "banana", "banana"),
    _category(53, "apple", "red-apple", colours=("red", "yellow", "green")),
    _category(55, "orange", "tangerine"),
    _category(56, "broccoli", "broccoli", "broccoli"),
    _category(57, "carrot", "carrot"),
    _category(59, "pizza", "pizza"),
    _category(60, "donut", "doughnut"),
    _category(61, "cake", "birthday-cake"),
    _category(62, "chair", "chair", colours=_ALL),
    _category(63, "couch", "couch-and-lamp", "couches", _ALL),
    _category(64, "potted plant", "potted-plant"),
    _category(84, "book", "closed-book", colours=_ALL),
    _category(85, "clock", "alarm-clock", colours=_ALL),
)
CATEGORY_NAMES: tuple[str, ...] = tuple(c.name for c in CATEGORIES)
_BY_NAME = {c.name: c for c in CATEGORIES}

#: every sprite: category and colour (None for the natural look), in the order of the sheet
LOOKS: tuple[tuple[str, str | None], ...] = tuple(
    (c.name, colour) for c in CATEGORIES for colour in (None, *c.colours)
)


def phrase_of(category: str, colour: str | None) -> str:
    """For example "car", "blue car"."""
    return f"{colour} {category}" if colour else category


PHRASES: tuple[str, ...] = tuple(phrase_of(*look) for look in LOOKS)
PLURALS: dict[str, str] = {phrase_of(n, c): phrase_of(_BY_NAME[n].plural, c) for n, c in LOOKS}
#: COCO's own ids, and for coloured ones a hundred more per colour
COCO_IDS: dict[str, int] = {
    phrase_of(name, colour): _BY_NAME[name].id + (100 * (_ALL.index(colour) + 1) if colour else 0)
    for name, colour in LOOKS
}
HELD_OUT_PAIRS = held_out_pairs(CATEGORY_NAMES)

_Pattern = Literal["tiles", "stripes", "planks", "bricks"]


@dataclass(frozen=True)
class Background:
    """Two colours, from top to bottom; ``horizon`` is a share of the height, None for a gradient.

    A pattern is of the two colours in turns.
    """

    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    horizon: float | None = None
    pattern: _Pattern | None = None


BACKGROUNDS: dict[str, Background] = {
    "on a green field": Background((168, 214, 240), (104, 178, 88), 0.4),
    "on a sandy beach": Background((120, 196, 232), (236, 210, 150), 0.45),
    "on a snowy hill": Background((150, 180, 214), (240, 244, 250), 0.5),
    "on a gray road": Background((190, 222, 244), (126, 128, 136), 0.5),
    "in a red desert": Background((250, 214, 150), (204, 112, 72), 0.5),
    "by the sea": Background((206, 232, 248), (46, 124, 190), 0.55),
    "in a blue sky": Background((96, 160, 236), (176, 214, 250)),
    "at night": Background((18, 22, 56), (48, 48, 98)),
    "at sunset": Background((116, 70, 140), (250, 156, 96)),
    "in a dark forest": Background((20, 60, 44), (42, 96, 58)),
    "in front of a gray wall": Background((158, 158, 162), (130, 130, 136)),
    "in front of a white wall": Background((250, 250, 246), (226, 226, 222)),
    "in front of a striped wall": Background((244, 232, 206), (216, 196, 160), pattern="stripes"),
    "in front of a brick wall": Background((186, 100, 80), (164, 84, 66), pattern="bricks"),
    "on a pink table": Background((250, 196, 212), (238, 162, 188)),
    "on a brown floor": Background((190, 150, 112), (140, 100, 70)),
    "on a wooden table": Background((206, 160, 108), (190, 142, 92), pattern="planks"),
    "on a checkered floor": Background((232, 236, 240), (176, 192, 206), pattern="tiles"),
}

#: larger boxes than the first edition's never, smaller ones at times
_SIDES = ((0.26, 0.85), (0.22, 0.6), (0.2, 0.48), (0.18, 0.42), (0.16, 0.38))
_MAX_OVERLAP = 0.1
_COLOURED_SHARE = 0.7
"""How often a kind that has colours is named with one."""
_MIXED_SHARE = 0.35
"""How often several objects of a coloured kind are of two colours."""


@dataclass(frozen=True)
class ColouredObject(SceneObject):
    """One object of the second edition; ``colour`` is None for the natural look."""

    colour: str | None = None

    @property
    def phrase(self) -> str:
        """What a layout calls it."""
        return phrase_of(self.category, self.colour)


@lru_cache(maxsize=1)
def sprites() -> dict[tuple[str, str | None], Image.Image]:
    """The art, RGBA, each cropped to what is visible."""
    with Image.open(ASSETS / "sprites2.png") as file:
        sheet = file.convert("RGBA")
    found = {}
    for index, look in enumerate(LOOKS):
        row, column = divmod(index, SHEET_COLUMNS)
        x, y = column * SPRITE_SIDE, row * SPRITE_SIDE
        cell = sheet.crop((x, y, x + SPRITE_SIDE, y + SPRITE_SIDE))
        found[look] = cell.crop(cell.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    return found


@lru_cache(maxsize=1)
def _aspects() -> dict[str, float]:
    """Natural width / height of each category."""
    return {name: sprites()[name, None].width / sprites()[name, None].height for name, _ in LOOKS}


def _choose_colours(rng: np.random.Generator, categories: Sequence[str]) -> list[str | None]:
    """A colour per object, or None; those of one kind share it, or are of two."""
    choices: dict[str, list[str | None]] = {}
    for name in dict.fromkeys(categories):
        colours: tuple[str | None, ...] = _BY_NAME[name].colours
        if not colours or rng.random() > _COLOURED_SHARE:
            choices[name] = [None]
        else:
            several = categories.count(name) > 1 and rng.random() < _MIXED_SHARE
            picked = rng.choice(len(colours), 2 if several else 1, replace=False)
            choices[name] = [colours[i] for i in picked]
    turns = dict.fromkeys(choices, 0)
    chosen: list[str | None] = []
    for name in categories:
        chosen.append(choices[name][turns[name] % len(choices[name])])
        turns[name] += 1
    return chosen


def sample_scene(split: Split, index: int, image_size: int = IMAGE_SIZE) -> Scene:
    """The scene with this index. Boxes are tight and lie on whole pixels of ``image_size``."""
    rng = split_rng(split, index, 20)
    while True:
        count = int(rng.choice(np.arange(1, MAX_OBJECTS + 1), p=[0.3, 0.3, 0.2, 0.12, 0.08]))
        categories = choose_categories(rng, count, CATEGORY_NAMES, HELD_OUT_PAIRS, split == "test")
        aspects = [_aspects()[name] for name in categories]
        pixels = place(rng, aspects, image_size, _SIDES, _MAX_OVERLAP)
        if pixels is not None:
            break
    background = str(rng.choice(list(BACKGROUNDS)))
    shares = (np.array(pixels) / image_size).tolist()
    objects = tuple(
        ColouredObject(name, (x0, y0, x1, y1), colour)
        for name, colour, (x0, y0, x1, y1) in zip(
            categories, _choose_colours(rng, categories), shares, strict=True
        )
    )
    return Scene(write_captions(objects, background, PLURALS), background, objects)


def _patterned(style: Background, jitter: np.ndarray, side: int) -> Image.Image:
    """Cells of an eighth of the side in two colours; bricks and planks have dark joints."""
    y, x = np.mgrid[0:side, 0:side] * 8 // side
    joints = np.zeros((side, side), bool)
    if style.pattern == "tiles":
        second = (x + y) % 2 == 1
    elif style.pattern == "stripes":
        second = x % 2 == 1
    else:
        second = y % 2 == 1
        line = max(1, side // 64)
        rows, columns = np.mgrid[0:side, 0:side]
        joints = rows * 8 % side < 8 * line
        if style.pattern == "bricks":
            shifted = columns + (y % 2) * (side // 8)
            joints |= shifted * 4 % side < 4 * line
    colours = np.array([style.top, style.bottom]) + jitter
    pixels = np.where(second[..., None], colours[1], colours[0])
    pixels = np.where(joints[..., None], colours[1] * 0.8, pixels)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")


def _background(rng: np.random.Generator, phrase: str, side: int) -> Image.Image:
    style = BACKGROUNDS[phrase]
    if style.pattern is None:
        return gradient(rng, style.top, style.bottom, style.horizon, side)
    return _patterned(style, rng.uniform(-12, 12, size=(2, 3)), side)


def outlined(sprite: Image.Image, width: int, height: int) -> Image.Image:
    """``sprite`` in a box of ``width`` x ``height`` pixels, with a dark line around it (RGBA)."""
    line = 2 if min(width, height) >= 40 else 1
    inner = (max(1, width - 2 * line), max(1, height - 2 * line))
    small = sprite.resize(inner, Image.Resampling.LANCZOS)
    figure = Image.new("RGBA", (width, height))
    figure.paste(small, (line, line))
    grown = figure.getchannel("A")
    for _ in range(line):
        grown = grown.filter(ImageFilter.MaxFilter(3))
    outline = Image.new("RGBA", (width, height), OUTLINE)
    outline.putalpha(grown)
    return Image.alpha_composite(outline, figure)


def render_scene(
    scene: Scene, split: Split, index: int, image_size: int = IMAGE_SIZE
) -> Image.Image:
    """RGB picture of ``scene``; (split, index) seed the background's colours."""
    canvas = _background(split_rng(split, index, 21), scene.background, image_size)
    for item in scene.objects:
        colour = item.colour if isinstance(item, ColouredObject) else None
        x0, y0, x1, y1 = (round(v * image_size) for v in item.box)
        figure = outlined(sprites()[item.category, colour], x1 - x0, y1 - y0)
        canvas.paste(figure, (x0, y0), figure)
    return canvas


SECOND = Edition(
    number=2,
    image_size=IMAGE_SIZE,
    categories=CATEGORIES,
    phrases=PHRASES,
    coco_ids=COCO_IDS,
    backgrounds=tuple(BACKGROUNDS),
    sample=sample_scene,
    render=render_scene,
)


if __name__ == "__main__":
    sys.exit(run_program(partial(main, edition=SECOND)))
