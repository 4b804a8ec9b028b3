"""What the model sees of an image: a centre crop, perhaps mirrored, with the boxes moved along.

A layout is never changed: each function returns a new one.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

from PIL import Image, ImageOps

from hcma_fast.layout import Layout, is_empty

Part = Literal["train", "val"]
VAL_SHARE = 0.2
MIN_AREA = 0.01
"""Smallest box, as a share of the image"""
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


def part_of(image_id: int) -> Part:
    """The part an image belongs to: 80% train, 20% val, by a hash of its id and nothing else."""
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < VAL_SHARE * 2**64 else "train"


def mentions_side(caption: str) -> bool:
    """Would mirroring the image make ``caption`` wrong? (left, right, leftmost, right-hand)"""
    return _SIDES.search(caption) is not None


def crop_image(image: Image.Image, size: int) -> Image.Image:
    """RGB, short side resized to ``size``, cropped to the square in the middle."""
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)


def crop_layout(layout: Layout, width: int, height: int, min_area: float = MIN_AREA) -> Layout:
    """The boxes of a ``width`` x ``height`` image after :func:`crop_image`.

    Left out are boxes below ``min_area`` of the image, and those of which less than that share of
    the crop is left: of most of these only an edge shows.
    """
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    phrases, boxes = [], []
    for phrase, (x0, y0, x1, y1) in zip(layout.phrases, layout.boxes, strict=True):
        moved = (
            _clip((x0 * width - left) / side),
            _clip((y0 * height - top) / side),
            _clip((x1 * width - left) / side),
            _clip((y1 * height - top) / side),
        )
        remaining = (moved[2] - moved[0]) * (moved[3] - moved[1])
        large = (x1 - x0) * (y1 - y0) >= min_area and remaining >= min_area
        if large and not is_empty(moved):
            phrases.append(phrase)
            boxes.append(moved)
    return Layout(phrases, boxes)


def flip_layout(layout: Layout) -> Layout:
    """The boxes after the image is mirrored left to right."""
    return Layout(layout.phrases, [(1 - x1, y0, 1 - x0, y1) for x0, y0, x1, y1 in layout.boxes])


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
