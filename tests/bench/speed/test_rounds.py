"""Turns of a group, its speed-ups within a round, and void rows; the cases run in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hcma_fast.bench.speed.harness.report import Row
from hcma_fast.bench.speed.harness.rounds import Case, Group, group_rows, take_turns
from hcma_fast.bench.speed.harness.workers import Contestant, Loaded, Run, worker
from hcma_fast.bench.speed.plain_and_ours import PLAIN

GOOD = np.array([3.0, 4.0], dtype=np.float32)


def recording(
    name: str, latents: NDArray[np.float32], calls: list[str], *seconds: float
) -> Callable[[], Run]:
    left = list(seconds)

    def run() -> Run:
        calls.append(name)
        return Run(left.pop(0) if left else 1.0, latents, float(len(calls)))

    return run


def never() -> Contestant:
    raise AssertionError("nothing is loaded")


def rows_of(
    runs: dict[str, Callable[[], Run]], rounds: int, *, said: list[str] | None = None, **case: Any
) -> tuple[Row, ...]:
    """Rows of a group whose cases run here."""
    group = Group("fakes", [Case(name, never, **case) for name in runs])
    say = (lambda line: None) if said is None else said.append
    turns = take_turns(group, group.cases, runs, rounds, say)
    return group_rows(group, turns, dict.fromkeys(turns, Loaded("fake", "0" * 64, 2.0)))


def test_contestants_take_turns_there_and_back_after_one_warm_up() -> None:
    calls: list[str] = []
    said: list[str] = []
    rows = rows_of({name: recording(name, GOOD, calls) for name in "ABC"}, 2, said=said)
    assert calls == list("ABCCBAABC")
    assert said[0] == "A, warm-up" and said[-1] == "C, round 2 of 2, about 0 s left of this group"
    assert [row.name for row in rows] == list("ABC")
    for row in rows:
        assert len(row.seconds) == 2 and not row.void and row.load_s == 2
        assert row.p10_s <= row.median_s <= row.p90_s <= row.p99_s
    assert rows[0].speedup == 1 and rows[0].relative_error == 0
    # that of the last run
    assert rows[2].peak_rss_mib == 9


def test_a_case_without_a_warm_up_runs_once_less() -> None:
    calls: list[str] = []
    (row,) = rows_of({"A": recording("A", GOOD, calls, 5, 7)}, 2, warm_up=False, max_error=None)
    assert calls == ["A", "A"] and row.seconds == (5, 7) and row.warm_up_s is None


def test_speedups_are_ratios_per_image_within_a_round() -> None:
    plain, ours = rows_of(
        {
            PLAIN: recording(PLAIN, GOOD, [], 90, 4, 8, 12),
            "ours": recording("ours", GOOD, [], 50, 2, 2, 2),
        },
        3,
        images=4,
    )
    assert plain.seconds == (4, 8, 12) and plain.median_s == 8 and plain.images_per_second == 0.5
    assert ours.seconds == (2, 2, 2) and ours.warm_up_s == 50
    assert ours.speedup == 4
    assert ours.speedup_interval == pytest.approx((2.4, 5.6))


@pytest.mark.parametrize(
    ("latents", "error"),
    [
        (GOOD * np.float32(1.0005), 5e-4),
        (GOOD * np.float32(1.01), 1e-2),
        (GOOD * np.float32(math.nan), None),
        (GOOD * np.float32(math.inf), None),
        (GOOD[:1], None),
    ],
)
def test_a_row_that_does_not_agree_is_void(
    latents: NDArray[np.float32], error: float | None
) -> None:
    _, row = rows_of({"A": recording("A", GOOD, []), "B": recording("B", latents, [])}, 1)
    assert row.relative_error == (None if error is None else pytest.approx(error, rel=1e-3))
    assert row.void == (error is None or error > 1e-3)
    assert (row.speedup is None) == (row.speedup_interval is None) == row.void


def test_results_that_are_not_compared_are_never_void() -> None:
    _, row = rows_of(
        {"A": recording("A", GOOD, []), "B": recording("B", GOOD[:1], [])}, 1, max_error=None
    )
    assert not row.void and row.speedup is None and row.relative_error is None


def test_no_worker_rounds_float32_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch's convolutions would on a GPU, and our engines' would not."""
    given: dict[str, str] = {}

    def start(command: object, *, env: dict[str, str], **_: object) -> None:
        given.update(env)
        raise OSError("seen")

    monkeypatch.setattr("hcma_fast.bench.speed.harness.workers.subprocess.Popen", start)
    load = partial(Contestant, lambda: np.zeros(1, np.float32), "fake", "0")
    with pytest.raises(OSError, match="seen"), worker("a", load):
        pass
    assert given["NVIDIA_TF32_OVERRIDE"] == "0" and given["PYTHONSAFEPATH"] == "1"
