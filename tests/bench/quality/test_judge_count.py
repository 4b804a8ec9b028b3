"""Objects counted: each category as often as asked for, and none outside of the boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcma_fast.bench.quality.metrics.judge.count import categories_match, is_clear, outside_windows
from hcma_fast.bench.quality.metrics.judge.data import MAX_COVER, NONE, cover
from hcma_fast.bench.quality.metrics.judge.model import Judge, Verdict
from hcma_fast.layout import Layout
from hcma_fast.train.data.emoji_scenes import render_scene, sample_scene

DOGS = Layout(["dog", "dog", "cat"], [(0, 0, 0.2, 0.2), (0.3, 0, 0.5, 0.2), (0.6, 0, 0.8, 0.2)])


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        (["dog", "dog", "cat"], True),
        # in another box than asked for, the number is still right
        (["cat", "dog", "dog"], True),
        (["dog", "cat", "cat"], False),
        (["dog", "dog", NONE], False),
        (["dog", "dog", "pizza"], False),
    ],
)
def test_a_count_asks_for_categories_and_not_for_places(seen: list[str], right: bool) -> None:
    assert categories_match(DOGS, [Verdict(name, 0.9) for name in seen]) == right


def test_a_window_shows_an_object_when_the_judge_is_sure() -> None:
    nothing, doubt = Verdict(NONE, 0.9), Verdict("dog", 0.4)
    assert is_clear([]) and is_clear([nothing, doubt])
    assert not is_clear([nothing, Verdict("dog", 0.6)])


_low, _side = st.floats(0, 0.5), st.floats(0.1, 0.5)
_boxes = st.lists(
    st.builds(lambda x, y, w, h: (x, y, x + w, y + h), _low, _low, _side, _side), max_size=5
)


@settings(max_examples=25)
@given(_boxes)
def test_windows_lie_in_the_image_and_outside_of_the_boxes(
    boxes: list[tuple[float, float, float, float]],
) -> None:
    for window in outside_windows(boxes):
        assert cover(window, boxes) < MAX_COVER
        assert min(window[:2]) >= 0 and max(window[2:]) <= 1 + 1e-9


def test_every_place_of_an_empty_layout_is_looked_at() -> None:
    windows = outside_windows([])
    for x, y in np.random.default_rng(0).random((200, 2)):
        assert any(x0 <= x <= x1 + 1e-9 and y0 <= y <= y1 + 1e-9 for x0, y0, x1, y1 in windows)
    assert outside_windows([(0, 0, 1, 1)]) == []


def test_the_judge_finds_an_object_that_the_layout_lacks() -> None:
    judge, missed, false = Judge.load(), 0, 0
    # not among the scenes that it was trained on
    for index in range(7000, 7020):
        scene = sample_scene("judge", index)
        picture = np.asarray(render_scene(scene, "judge", index))[None]
        boxes = [item.box for item in scene.objects]
        all_but_one, all_of_them = outside_windows(boxes[1:]), outside_windows(boxes)
        missed += is_clear(judge.predict(picture, [all_but_one])[0])
        false += not is_clear(judge.predict(picture, [all_of_them])[0])
    assert missed <= 5 and false == 0
