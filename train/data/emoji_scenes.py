"""EmojiScenes: captioned scenes with labelled boxes, the embedded model's data.

This is the first edition, of 64 pixels, and what both editions share; :mod:`emoji_scenes2` is the
second, of 128. A scene is a pure function of (split, index): 1 to 5 emoji of 24 COCO categories on
one of eight backgrounds, a caption that names counts, relation and background, and a tight box per
object.
Some category pairs (``HELD_OUT_PAIRS``) occur in the test split only, to measure composition.
The art is Noto Emoji (assets/LICENSE-noto-emoji.txt). :func:`write_coco` stores a split in the
annotation format of COCO, so one reader serves both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from hcma_fast.errors import UsageError
from hcma_fast.files import make_folder, write_whole
from hcma_fast.program import run_program
from hcma_fast.train.data.scene_sampling import choose_categories, held_out_pairs, place

Split = Literal["train", "val", "test", "judge"]
SPLITS: tuple[Split, ...] = get_args(Split)
ASSETS = Path(__file__).parent / "assets"
SPRITE_SIDE = 96
MAX_OBJECTS = 5
MIN_IMAGE_SIZE = 16


@dataclass(frozen=True)
class Category:
    """A COCO category: id and name in COCO's own list, plural, glyph, natural width / height."""

    id: int
    name: str
    plural: str
    glyph: str
    aspect: float = 1.0


CATEGORIES: tuple[Category, ...] = (
    Category(3, "car", "cars", "🚗", 1.15),
    Category(5, "airplane", "airplanes", "✈️"),
    Category(6, "bus", "buses", "🚌", 1.15),
    Category(9, "boat", "boats", "⛵"),
    Category(13, "stop sign", "stop signs", "🛑"),
    Category(16, "bird", "birds", "🐦"),
    Category(17, "cat", "cats", "🐱"),
    Category(18, "dog", "dogs", "🐶"),
    Category(20, "sheep", "sheep", "🐑"),
    Category(21, "cow", "cows", "🐮"),
    Category(22, "elephant", "elephants", "🐘", 1.1),
    Category(23, "bear", "bears", "🐻"),
    Category(24, "zebra", "zebras", "🦓"),
    Category(25, "giraffe", "giraffes", "🦒", 0.8),
    Category(28, "umbrella", "umbrellas", "☂️"),
    Category(37, "sports ball", "sports balls", "⚽"),
    Category(52, "banana", "bananas", "🍌"),
    Category(53, "apple", "apples", "🍎"),
    Category(55, "orange", "oranges", "🍊"),
    Category(56, "broccoli", "broccoli", "🥦"),
    Category(57, "carrot", "carrots", "🥕"),
    Category(59, "pizza", "pizzas", "🍕"),
    Category(60, "donut", "donuts", "🍩"),
    Category(85, "clock", "clocks", "⏰"),
)
CATEGORY_NAMES: tuple[str, ...] = tuple(c.name for c in CATEGORIES)
_BY_NAME = {c.name: (i, c) for i, c in enumerate(CATEGORIES)}

#: phrase -> (top colour, bottom colour, horizon as a share of the height or None for a gradient)
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], float | None]] = {
    "on a green field": ((168, 214, 240), (104, 178, 88), 0.4),
    "on a sandy beach": ((120, 196, 232), (236, 210, 150), 0.45),
    "on a snowy hill": ((150, 180, 214), (240, 244, 250), 0.5),
    "in a blue sky": ((96, 160, 236), (176, 214, 250), None),
    "at night": ((18, 22, 56), (48, 48, 98), None),
    "in front of a gray wall": ((158, 158, 162), (130, 130, 136), None),
    "on a pink table": ((250, 196, 212), (238, 162, 188), None),
    "on a brown floor": ((190, 150, 112), (140, 100, 70), None),
}
PLURALS: dict[str, str] = {c.name: c.plural for c in CATEGORIES}
_NUMBERS = ("zero", "one", "two", "three", "four", "five")

#: carrot has none
HELD_OUT_PAIRS = held_out_pairs(CATEGORY_NAMES)


@dataclass(frozen=True)
class SceneObject:
    """One object: category name and tight box, xyxy in [0, 1]."""

    category: str
    box: tuple[float, float, float, float]

    @property
    def phrase(self) -> str:
        """What a layout calls it."""
        return self.category


@dataclass(frozen=True)
class Scene:
    """Captions (several wordings of one content), background phrase and 1 to 5 objects."""

    captions: tuple[str, ...]
    background: str
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Edition:
    """A set of scenes: what can be in them, and the functions that make them."""

    number: int
    image_size: int
    """side that its pictures are meant for, in pixels"""
    categories: tuple[Category, ...]
    phrases: tuple[str, ...]
    """what a layout can name"""
    coco_ids: dict[str, int]
    """of each phrase"""
    backgrounds: tuple[str, ...]
    sample: Callable[[Split, int, int], Scene]
    """from split, index and side in pixels"""
    render: Callable[[Scene, Split, int, int], Image.Image]
    """its RGB picture, from split, index and side"""


@lru_cache(maxsize=1)
def sprites() -> tuple[Image.Image, ...]:
    with Image.open(ASSETS / "sprites.png") as sheet:
        strip = sheet.convert("RGBA")
    side = SPRITE_SIDE
    return tuple(strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(len(CATEGORIES)))


def split_rng(split: Split, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS.index(split), index, stream])


def count_phrase(name: str, count: int, plurals: Mapping[str, str]) -> str:
    """For example "an apple", "two apples"."""
    if count > 1:
        return f"{_NUMBERS[count]} {plurals[name]}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _relation(first: list[SceneObject], second: list[SceneObject]) -> str | None:
    """How all of ``first`` lie to all of ``second``, judged by box centres with a margin."""

    def centres(objects: list[SceneObject], axis: int) -> list[float]:
        return [(o.box[axis] + o.box[axis + 2]) / 2 for o in objects]

    margin = 0.12
    if max(centres(first, 0)) + margin < min(centres(second, 0)):
        return "to the left of"
    if min(centres(first, 0)) - margin > max(centres(second, 0)):
        return "to the right of"
    if max(centres(first, 1)) + margin < min(centres(second, 1)):
        return "above"
    if min(centres(first, 1)) - margin > max(centres(second, 1)):
        return "below"
    return None


def write_captions(
    objects: Sequence[SceneObject], background: str, plurals: Mapping[str, str]
) -> tuple[str, ...]:
    """Wordings that name the objects' counts and the background, and a relation that is true."""
    counts = Counter(o.phrase for o in objects)
    phrases = [count_phrase(name, n, plurals) for name, n in counts.items()]
    if len(phrases) == 1:
        return (f"{phrases[0]} {background}", f"a picture of {phrases[0]} {background}")
    joined = f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    captions = [f"{joined} {background}"]
    if len(phrases) == 2:
        groups = [[o for o in objects if o.phrase == name] for name in counts]
        relation = _relation(groups[0], groups[1])
        link = relation if relation else "beside"
        captions.append(f"{phrases[0]} {link} {phrases[1]} {background}")
    else:
        captions.append(f"a picture of {joined} {background}")
    return tuple(captions)


def sample_scene(split: Split, index: int, image_size: int = 64) -> Scene:
    """The scene with this index. Boxes are tight and lie on whole pixels of ``image_size``."""
    rng = split_rng(split, index, 0)
    while True:
        count = int(rng.choice(np.arange(1, MAX_OBJECTS + 1), p=[0.3, 0.3, 0.2, 0.12, 0.08]))
        categories = choose_categories(rng, count, CATEGORY_NAMES, HELD_OUT_PAIRS, split == "test")
        pixels = place(rng, [_BY_NAME[name][1].aspect for name in categories], image_size)
        if pixels is not None:
            break
    background = str(rng.choice(list(BACKGROUNDS)))
    objects = tuple(
        SceneObject(name, (x0 / image_size, y0 / image_size, x1 / image_size, y1 / image_size))
        for name, (x0, y0, x1, y1) in zip(categories, pixels, strict=True)
    )
    return Scene(write_captions(objects, background, PLURALS), background, objects)


def gradient(
    rng: np.random.Generator,
    top: tuple[int, int, int],
    bottom: tuple[int, int, int],
    horizon: float | None,
    side: int,
) -> Image.Image:
    """A square from ``top`` to ``bottom``, at once at ``horizon`` (a share) or step by step."""
    jitter = rng.uniform(-12, 12, size=(2, 3))
    top_colour, bottom_colour = np.array(top) + jitter[0], np.array(bottom) + jitter[1]
    rows = (np.arange(side)[:, None] + 0.5) / side
    if horizon is None:
        weight = rows
    else:
        edge = horizon + rng.uniform(-0.08, 0.08)
        weight = np.clip((rows - edge) * side + 0.5, 0, 1)
    column = top_colour * (1 - weight) + bottom_colour * weight
    pixels = np.broadcast_to(column[:, None, :], (side, side, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")


def render_scene(scene: Scene, split: Split, index: int, image_size: int = 64) -> Image.Image:
    """RGB picture of ``scene``; (split, index) seed the colour jitter and mirrored sprites."""
    rng = split_rng(split, index, 1)
    canvas = gradient(rng, *BACKGROUNDS[scene.background], image_size)
    for item in scene.objects:
        sprite = sprites()[_BY_NAME[item.category][0]]
        x0, y0, x1, y1 = (round(v * image_size) for v in item.box)
        sprite = sprite.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, reducing_gap=2.0)
        if rng.random() < 0.5 and item.category != "stop sign":
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas.paste(sprite, (x0, y0), sprite)
    return canvas


FIRST = Edition(
    number=1,
    image_size=64,
    categories=CATEGORIES,
    phrases=CATEGORY_NAMES,
    coco_ids={c.name: c.id for c in CATEGORIES},
    backgrounds=tuple(BACKGROUNDS),
    sample=sample_scene,
    render=render_scene,
)


def write_coco(
    folder: Path, split: Split, count: int, image_size: int = 64, edition: Edition = FIRST
) -> None:
    """Write ``count`` scenes: ``{split}/*.png``, ``annotations/{instances,captions}_{split}.json``.

    The annotations come last, each file whole or not at all.

    Raises:
        UsageError: a count or size below its minimum.
        OutputError: the folder cannot be written to, or the disk is full.
    """
    if count < 1 or image_size < MIN_IMAGE_SIZE:
        raise UsageError(
            f"a split needs 1 scene and {MIN_IMAGE_SIZE} pixels a side at least",
            value=(count, image_size),
            remedy="For example --count 100 --size 64.",
        )
    _write_split(folder, split, count, image_size, edition)


def _write_split(folder: Path, split: Split, count: int, image_size: int, edition: Edition) -> None:
    images: list[dict[str, object]] = []
    instances: list[dict[str, object]] = []
    captions: list[dict[str, object]] = []
    make_folder(folder / split)
    make_folder(folder / "annotations")
    for index in range(count):
        scene = edition.sample(split, index, image_size)
        name = f"{index:012d}.png"
        picture = edition.render(scene, split, index, image_size)
        write_whole(folder / split / name, partial(picture.save, format="PNG"))
        images.append({"id": index, "file_name": name, "width": image_size, "height": image_size})
        for item in scene.objects:
            x0, y0, x1, y1 = (round(v * image_size) for v in item.box)
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": index,
                    "category_id": edition.coco_ids[item.phrase],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
        captions += [
            {"id": len(captions) + k + 1, "image_id": index, "caption": text}
            for k, text in enumerate(scene.captions)
        ]
    info = {
        "description": f"EmojiScenes {split}, {image_size} px",
        "version": str(edition.number),
    }
    categories = [
        {"id": number, "name": name, "supercategory": "emoji"}
        for name, number in edition.coco_ids.items()
    ]
    for kind, records in (("instances", instances), ("captions", captions)):
        document: dict[str, object] = {"info": info, "images": images, "annotations": records}
        if kind == "instances":
            document["categories"] = categories
        content = json.dumps(document).encode()
        path = folder / "annotations" / f"{kind}_{split}.json"
        write_whole(path, lambda file, content=content: file.write(content))  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None, edition: Edition = FIRST) -> None:
    """Write a split in COCO's format."""
    suffix = "" if edition is FIRST else edition.number
    parser = argparse.ArgumentParser(
        prog=f"python -m hcma_fast.train.data.emoji_scenes{suffix}",
        description="Write EmojiScenes in COCO's annotation format.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=100, help="scenes; scene i is always the same")
    parser.add_argument(
        "--size", type=int, default=edition.image_size, help="side of the images in pixels"
    )
    args = parser.parse_args(arguments)
    write_coco(args.out, args.split, args.count, args.size, edition)
    print(f"wrote {args.count} scenes of {args.split} to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_program(main))
