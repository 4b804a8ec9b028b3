"""The drawn layout: enlarged, with a frame and a label for each box."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hcma_fast.layout import Layout
from hcma_fast.overlay import draw_layout

GREY = Image.new("RGB", (64, 64), (128, 128, 128))


def _changed(layout: Layout) -> np.ndarray:
    return np.any(np.asarray(draw_layout(GREY, layout)) != 128, axis=-1)


@pytest.mark.parametrize(("size", "expected"), [(16, 512), (64, 512), (96, 576), (512, 512)])
def test_small_images_are_enlarged_by_a_whole_factor(size: int, expected: int) -> None:
    image = Image.new("RGB", (size, size))
    assert draw_layout(image, Layout.empty()).size == (expected, expected)
    assert image.size == (size, size)


def test_an_empty_layout_draws_nothing() -> None:
    assert not _changed(Layout.empty()).any()


def test_the_frame_lies_on_the_box() -> None:
    changed = _changed(Layout(["dog"], [(0.25, 0.5, 0.75, 0.875)]))
    last = 511
    for y in (round(0.5 * last), round(0.875 * last)):
        assert changed[y, round(0.25 * last) : round(0.75 * last) + 1].all()
    for x in (round(0.25 * last), round(0.75 * last)):
        assert changed[round(0.5 * last) : round(0.875 * last) + 1, x].all()
    # nothing outside, and the middle stays visible
    assert not changed[:200].any() and not changed[:, :100].any() and not changed[350, 250]


def test_label_and_colours_differ_by_box() -> None:
    one = np.asarray(draw_layout(GREY, Layout(["dog"], [(0.1, 0.1, 0.9, 0.9)])))
    other = np.asarray(draw_layout(GREY, Layout(["cat"], [(0.1, 0.1, 0.9, 0.9)])))
    assert (one != other).any()
    two = np.asarray(
        draw_layout(GREY, Layout(["a", "a"], [(0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 1.0, 1.0)]))
    )
    assert tuple(two[200, 0]) != tuple(two[400, 511])


@pytest.mark.parametrize("box", [(0.98, 0.98, 1.0, 1.0), (0.0, 0.0, 1e-4, 1e-4)])
def test_the_label_stays_inside_whatever_the_box(box: tuple[float, ...]) -> None:
    changed = _changed(Layout(["a very long phrase " * 10, "line\nbreak"], [box, box]))
    rows, columns = np.nonzero(changed)
    assert np.ptp(columns) > 300 or columns.size > 500
    assert rows.size > 500
