"""How many objects the judge sees: in a layout's boxes, and in windows outside of them.

The judge is a classifier of boxes, not a detector: it cannot search a picture. So a count is of two
parts. In the boxes, each category must be seen as often as the layout has it, in whichever of them.
Outside, windows of a fixed grid must show nothing but background.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hcma_fast.bench.quality.metrics.judge.data import MAX_COVER, NONE, cover
from hcma_fast.bench.quality.metrics.judge.model import Verdict
from hcma_fast.layout import Box, Layout

WINDOW_SIDES = (0.25, 0.4)
"""Shares of the image's side; EmojiScenes' objects have 0.2 to 0.85"""
SURE = 0.5
"""Least probability of an object in a window. On 200 renders that the judge was not trained on: no
false object; one that the boxes leave out is found in 92% of them, in 94% when they are blurred."""


def outside_windows(boxes: Sequence[Box]) -> list[Box]:
    """Windows of a grid of half their side, of which the boxes cover next to nothing.

    As in the judge's training, where such crops are background.
    """
    found: list[Box] = []
    for side in WINDOW_SIDES:
        steps = round((1 - side) / (side / 2))
        places = [i * (1 - side) / steps for i in range(steps + 1)]
        windows: list[Box] = [(x, y, x + side, y + side) for y in places for x in places]
        found += [window for window in windows if cover(window, boxes) < MAX_COVER]
    return found


def categories_match(layout: Layout, seen: Sequence[Verdict]) -> bool:
    """Do the boxes show each category as often as the layout has it?"""
    return Counter(layout.phrases) == Counter(verdict.category for verdict in seen)


def is_clear(seen: Sequence[Verdict]) -> bool:
    """Do the windows show background, or nothing that the judge is sure of?"""
    return all(v.category == NONE or v.probability < SURE for v in seen)
