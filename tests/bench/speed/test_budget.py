"""What an image costs stays within the committed budget: counted, so that no machine matters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hcma_fast.bench.speed.budget import Counts, count_pipeline, count_tiny, over_budget
from hcma_fast.config import TOKEN_LENGTH
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.runtime import engine_room
from hcma_fast.sampling.loop import sample

BUDGET: Counts = json.loads(Path(__file__).with_name("budget.json").read_text())


def test_an_image_costs_no_more_than_its_budget() -> None:
    assert not over_budget(count_tiny(), BUDGET), (
        "see bench/speed/budget.py for how to write a new one"
    )


@pytest.mark.parametrize(
    ("part", "what", "change", "problem"),
    [
        ("align", "flops", lambda n: n, None),
        ("align", "flops", lambda n: n + 1, "budget"),
        ("align", "flops", lambda n: int(0.9 * n), None),
        ("align", "flops", lambda n: int(0.7 * n), "leaner"),
        ("sampler", "python_calls", lambda n: int(1.05 * n), None),
        ("sampler", "python_calls", lambda n: int(1.2 * n), "budget"),
        # not one more, and not one less
        ("sampler", "engine_calls", lambda n: n + 1, "not 101"),
        ("sampler", "engine_calls", lambda n: n - 1, "not 101"),
        ("pipeline, one image", "text_encoder", lambda n: n + 1, "not 1"),
        ("pipeline, 4 images", "unet_grounded", lambda n: n - 1, "not 51"),
    ],
)
def test_what_is_above_its_budget(
    part: str, what: str, change: Callable[[int], int], problem: str | None
) -> None:
    found = copy.deepcopy(BUDGET)
    found[part][what] = change(found[part][what])
    problems = over_budget(found, BUDGET)
    assert len(problems) == (problem is not None)
    assert problem is None or (problem in problems[0] and f"{part}: {what}" in problems[0])


def test_what_is_not_counted_any_more_is_a_problem() -> None:
    found = copy.deepcopy(BUDGET)
    del found["sampler"]["engine_calls"]
    assert over_budget(found, BUDGET) == ["sampler: engine_calls None, budget 101"]
    del found["align"]
    assert over_budget(found, BUDGET) == ["the parts differ: ['align']"]


def test_encoding_again_at_every_step_is_above_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = load_components("tiny")

    def wasteful(engines: Any, z: Any, given: Any, schedule: Any, *rest: Any, **named: Any) -> Any:
        ids = {"input_ids": torch.zeros(1, TOKEN_LENGTH, dtype=torch.int64)}
        for _ in schedule.table.evaluations:
            engines["text_encoder"](ids)
        return sample(engines, z, given, schedule, *rest, **named)

    before = count_pipeline(parts, 1)
    assert before == BUDGET["pipeline, one image"]
    monkeypatch.setattr(engine_room, "sample", wasteful)
    found = count_pipeline(parts, 1)
    assert found["text_encoder"] == before["text_encoder"] + 51
    (problem,) = over_budget({**BUDGET, "pipeline, one image": found}, BUDGET)
    assert problem == "pipeline, one image: text_encoder 52, not 1"
