"""Crops and mirrors: the boxes go where the pixels go; the split depends on the id alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from hcma_fast.layout import Layout
from hcma_fast.train.data.views import (
    crop_image,
    crop_layout,
    flip_layout,
    mentions_side,
    part_of,
)

Pixels = tuple[int, int, int, int]


@st.composite
def images_with_box(draw: st.DrawFn) -> tuple[int, int, Pixels]:
    """Width, height and a box on whole pixels."""
    width, height = draw(st.integers(16, 90)), draw(st.integers(16, 90))
    x0, y0 = draw(st.integers(0, width - 4)), draw(st.integers(0, height - 4))
    x1, y1 = draw(st.integers(x0 + 4, width)), draw(st.integers(y0 + 4, height))
    return width, height, (x0, y0, x1, y1)


def drawn(width: int, height: int, box: Pixels) -> Image.Image:
    """Black, and white inside the box."""
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    return image


# an edge of the crop, but for rounding
@example(case=(69, 57, (63, 0, 67, 4)), size=8, flip=False)
@given(images_with_box(), st.sampled_from([8, 16, 32, 64]), st.booleans())
def test_pixels_drawn_in_a_box_stay_in_the_moved_box(
    case: tuple[int, int, Pixels], size: int, flip: bool
) -> None:
    width, height, box = case
    layout = Layout.from_pixels(["dog"], [box], width, height)
    before = layout.to_json()
    moved = crop_layout(layout, width, height, min_area=0.0)
    crop = crop_image(drawn(width, height, box), size)
    assert crop.size == (size, size) and crop.mode == "RGB"
    bright = np.asarray(crop)[:, :, 0] / 255
    if flip:
        moved, bright = flip_layout(moved), bright[:, ::-1]
    assert layout.to_json() == before
    if not len(moved):
        assert bright.max() < 0.5
        return
    x0, y0, x1, y1 = (v * size for v in moved.boxes[0])
    centres = np.arange(size) + 0.5
    # resampling blurs an edge by half a pixel, of the image's or the crop's, whichever is larger
    blur = 0.5 * max(1.0, size / min(width, height))
    inside = (centres[:, None] > y0 - blur) & (centres[:, None] < y1 + blur)
    inside = inside & (centres > x0 - blur) & (centres < x1 + blur)
    assert (bright[~inside] < 0.5).all()
    core = (centres[:, None] > y0 + blur) & (centres[:, None] < y1 - blur)
    core = core & (centres > x0 + blur) & (centres < x1 - blur)
    # a box with sides of less than two such pixels is nowhere white
    if min(x1 - x0, y1 - y0) > 4 * blur:
        assert (bright[core] > 0.5).all()


@given(images_with_box())
def test_boxes_are_in_the_image_and_large_enough(case: tuple[int, int, Pixels]) -> None:
    width, height, box = case
    moved = crop_layout(Layout.from_pixels(["dog"], [box], width, height), width, height)
    area = (box[2] - box[0]) * (box[3] - box[1])
    if area < 0.01 * width * height:
        assert not len(moved)
    for x0, y0, x1, y1 in moved.boxes:
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 and (x1 - x0) * (y1 - y0) >= 0.01


@given(images_with_box())
def test_mirrored_twice_is_where_it_was(case: tuple[int, int, Pixels]) -> None:
    width, height, box = case
    layout = Layout.from_pixels(["dog"], [box], width, height)
    assume(len(layout) == 1)
    np.testing.assert_allclose(flip_layout(flip_layout(layout)).boxes, layout.boxes, atol=1e-12)


def test_a_wide_image_loses_its_sides() -> None:
    layout = Layout(
        ["left", "middle", "edge", "small", "sliver"],
        [
            [0.0, 0.0, 0.25, 1.0],
            [0.25, 0.0, 0.75, 0.5],
            [0.5, 0.5, 1.0, 1.0],
            [0.5, 0.5, 0.55, 0.6],
            [0.0, 0.0, 0.2505, 1.0],
        ],
    )
    moved = crop_layout(layout, 200, 100)
    assert moved == Layout(["middle", "edge"], [[0.0, 0.0, 1.0, 0.5], [0.5, 0.5, 1.0, 1.0]])


def test_parts_are_fixed_and_about_80_to_20() -> None:
    parts = [part_of(number) for number in range(20_000)]
    assert set(parts) == {"train", "val"}
    assert parts.count("val") / len(parts) == pytest.approx(0.2, abs=0.01)
    # by the id and nothing else: these never change
    assert [number for number in (8, 9, 25, 39, 57870, 581921) if part_of(number) == "val"] == [
        8,
        9,
        39,
        581921,
    ]


@pytest.mark.parametrize(
    ("caption", "side"),
    [
        ("a dog to the left of a cat", True),
        ("The RIGHTMOST car", True),
        ("a right-hand drive bus", True),
        ("a bright copyright notice", False),
        ("a dog beside a cat", False),
    ],
)
def test_captions_that_name_a_side(caption: str, side: bool) -> None:
    assert mentions_side(caption) is side
