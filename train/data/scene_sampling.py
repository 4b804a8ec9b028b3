"""What EmojiScenes draws at random, in all editions: the categories of a scene, and their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np


def held_out_pairs(names: Sequence[str]) -> frozenset[frozenset[str]]:
    """Every 9th pair of different categories: only the test split has them."""
    pairs = enumerate(combinations(names, 2))
    return frozenset(frozenset(pair) for k, pair in pairs if k % 9 == 4)


def choose_categories(
    rng: np.random.Generator,
    count: int,
    names: Sequence[str],
    held_out: frozenset[frozenset[str]],
    is_test: bool,
) -> list[str]:
    """Category of each object: one kind, or two (60% of the scenes with room), rarely three."""
    kinds = 1 if count == 1 else int(rng.choice([1, 2, 3], p=[0.3, 0.58, 0.12]))
    kinds = min(kinds, count)
    while True:
        if is_test and kinds == 2 and rng.random() < 0.5:
            choices = sorted(tuple(sorted(pair)) for pair in held_out)
            chosen = list(choices[rng.integers(len(choices))])
        else:
            chosen = [str(name) for name in rng.choice(names, size=kinds, replace=False)]
        pairs = {frozenset(pair) for pair in combinations(chosen, 2)}
        if is_test or not pairs & held_out:
            break
    extra = rng.integers(len(chosen), size=count - len(chosen))
    return sorted(chosen + [chosen[i] for i in extra], key=chosen.index)


#: least and largest side of an object, as a share of the image's, for 1 to 5 objects
_SIDES = ((0.3, 0.85), (0.26, 0.6), (0.25, 0.48), (0.22, 0.42), (0.2, 0.38))


def place(
    rng: np.random.Generator,
    aspects: Sequence[float],
    image_size: int,
    sides: Sequence[tuple[float, float]] = _SIDES,
    max_overlap: float = 0.06,
) -> list[tuple[int, int, int, int]] | None:
    """Pixel boxes, one for each natural aspect, that overlap little; None when there is no place.

    Args:
        sides: least and largest side for each number of objects, as shares of the image's.
    """
    low, high = sides[len(aspects) - 1]
    boxes: list[tuple[int, int, int, int]] = []
    for natural in aspects:
        aspect = natural * float(np.exp(rng.uniform(-0.3, 0.3)))
        for _ in range(40):
            side = rng.uniform(low, high) * image_size
            width = int(np.clip(round(side * aspect**0.5), 4, image_size - 2))
            height = int(np.clip(round(side / aspect**0.5), 4, image_size - 2))
            x = int(rng.integers(0, image_size - width + 1))
            y = int(rng.integers(0, image_size - height + 1))
            box = (x, y, x + width, y + height)
            if all(_overlap(box, other) < max_overlap for other in boxes):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection as a share of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller
