"""What an image costs stays within the committed budget: counted, so that no machine matters."""

from __future__ import annotations

import json
from pathlib import Path

from hcma_fast.bench.budget import count_tiny

BUDGET = Path(__file__).with_name("budget.json")
#: other versions of Python and torch may call a little more, or less
SLACK = {"python_calls": 0.1}


def test_an_image_costs_no_more_than_its_budget() -> None:
    budget, found = json.loads(BUDGET.read_text()), count_tiny()
    assert found.keys() == budget.keys()
    above = [
        f"{part}: {what} {value}, budget {budget[part][what]}"
        for part, counts in found.items()
        for what, value in counts.items()
        if value > budget[part][what] * (1 + SLACK.get(what, 0))
    ]
    assert not above, "see bench/budget.py: " + "; ".join(above)
    stale = [
        f"{part}: {what} {value}, budget {budget[part][what]}"
        for part, counts in found.items()
        for what, value in counts.items()
        if value < budget[part][what] * 0.8
    ]
    assert not stale, "leaner by a fifth: write it down, see bench/budget.py: " + "; ".join(stale)


def test_the_loop_calls_each_engine_as_often_as_it_must() -> None:
    budget = json.loads(BUDGET.read_text())
    # 50 alignments and 51 evaluations
    assert budget["sampler"]["engine_calls"] == budget["replayed sampler"]["engine_calls"] == 101
