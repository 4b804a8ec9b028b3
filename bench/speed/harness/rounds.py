"""Cases side by side, in turns: machines drift, so what is compared runs in the same minutes.

Each round runs every case of a group once (A B C, C B A, ...) and one at a time, so that a slow
minute of the machine hits all of them, and a speed-up is a ratio within a round. A row counts only
if its result agrees with that of the group's first case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hcma_fast.bench.speed.harness.report import Label, Row, within_rounds
from hcma_fast.bench.speed.harness.workers import Contestant, Loaded, Run, Worker, worker
from hcma_fast.errors import HcmaError, UsageError

MAX_ERROR = 1e-3
"""Relative error of a result above which its row is void, where a case does not say otherwise."""
HALF_ERROR = 0.1
"""The same of a row in half precision. Rounding to 8 bits at each of 50 steps moves latents by some
percent; another image is 1 away"""


@dataclass(frozen=True)
class Case:
    """One thing to measure, in a process of its own."""

    name: str
    load: Callable[[], Contestant]
    """picklable; runs in the process, and so does what it returns"""
    labels: Mapping[str, Label] = field(default_factory=dict)
    images: int = 1
    """that a run makes"""
    max_error: float | None = MAX_ERROR
    """None: its result is not compared, and there is no speed-up"""
    warm_up: bool = True
    """a first run that is not counted"""
    prepare: Callable[[Callable[[str], None]], None] | None = None
    """runs first, here, and is given what to report progress to: engines that have to be built"""


@dataclass(frozen=True)
class Group:
    """Cases that take turns; all of them are in memory at once. The first is the yardstick."""

    name: str
    cases: Sequence[Case]


def run_group(
    group: Group,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
    failed: dict[str, str] | None = None,
) -> tuple[Row, ...]:
    """Prepare all cases, load each in a process of its own, then run them in turns.

    Args:
        failed: gets the reason of each case that cannot run, and the others go on. Without the
            first case, those that are compared with it have no row, and are in here too. None: a
            failure is raised.

    Raises:
        UsageError: fewer than one round.
        HcmaError, MemoryError, OSError: what a case raised, or that its process died.
    """
    if rounds < 1:
        raise UsageError("rounds must be at least 1", value=rounds, remedy="Use 5.")
    ready = []
    for case in group.cases:
        try:
            if case.prepare is not None:
                case.prepare(say)
            ready.append(case)
        except (HcmaError, MemoryError, OSError) as error:
            _note(group, case.name, error, failed)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for case in ready:
            say(f"load {case.name}")
            try:
                workers[case.name] = stack.enter_context(worker(case.name, case.load))
            except (HcmaError, MemoryError, OSError) as error:
                _note(group, case.name, error, failed)
        kept = [case for case in group.cases if case.name in workers]
        turns = take_turns(group, kept, workers, rounds, say, failed)
        loaded = {name: workers[name].loaded for name in turns}
    rows = group_rows(group, turns, loaded)
    first = group.cases[0].name
    judged = {row.name for row in rows}
    for name in [name for name in turns if name not in judged]:
        what = f"it cannot be judged: {first}, which it is compared with, did not run"
        _note(group, name, HcmaError(what, remedy=f"See what {first} lacks."), failed)
    return rows


def take_turns(
    group: Group,
    cases: Sequence[Case],
    workers: Mapping[str, Callable[[], Run]],
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
    failed: dict[str, str] | None = None,
) -> dict[str, list[Run]]:
    """A warm-up each, then ``rounds`` rounds; returns the runs by name, the warm-up first.

    Every other round goes backwards, so that nobody always runs after the same other. A case
    without a warm-up has one run less.
    """
    turns: dict[str, list[Run]] = {case.name: [] for case in cases}
    for number in range(rounds + 1):
        for case in reversed(cases) if number % 2 else cases:
            if case.name not in turns or not (number or case.warm_up):
                continue
            say(f"{case.name}, {f'round {number} of {rounds}' if number else 'warm-up'}")
            try:
                turns[case.name].append(workers[case.name]())
            except (HcmaError, MemoryError, OSError) as error:
                _note(group, case.name, error, failed)
                del turns[case.name]
    return turns


def group_rows(
    group: Group, turns: Mapping[str, Sequence[Run]], loaded: Mapping[str, Loaded]
) -> tuple[Row, ...]:
    """A row for each case that has run, but for those whose yardstick, the first, has not."""
    first = group.cases[0]
    return tuple(
        _row(group, case, loaded[case.name], turns[case.name], first, turns.get(first.name, ()))
        for case in group.cases
        if case.name in turns and (case.max_error is None or first.name in turns)
    )


def _note(group: Group, name: str, error: Exception, failed: dict[str, str] | None) -> None:
    if failed is None:
        raise error
    failed[f"{group.name}: {name}"] = str(error) or type(error).__name__


def _row(
    group: Group,
    case: Case,
    loaded: Loaded,
    runs: Sequence[Run],
    first: Case,
    yardstick: Sequence[Run],
) -> Row:
    timed = runs[case.warm_up :]
    seconds = np.array([run.seconds for run in timed])
    p10, median, p90, p99 = np.percentile(seconds, [10, 50, 90, 99]).tolist()
    compared = case.max_error is not None
    error = math.nan
    if compared:
        # from the last on: one of both may have no warm-up
        pairs = zip(reversed(runs), reversed(yardstick), strict=False)
        # unlike max(), this keeps a NaN
        error = float(np.max([relative_error(run.result, of.result) for run, of in pairs]))
    void = compared and not error <= (case.max_error or 0)
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    if compared and not void:
        of = [run.seconds for run in yardstick[first.warm_up :]]
        ratio, *width = within_rounds(seconds.tolist(), case.images, of, first.images)
        interval = (width[0], width[1])
    return Row(
        group=group.name,
        name=case.name,
        labels=dict(case.labels),
        images=case.images,
        preset=loaded.preset,
        weights_hash=loaded.weights_hash,
        load_s=loaded.load_s,
        warm_up_s=runs[0].seconds if case.warm_up else None,
        seconds=tuple(seconds.tolist()),
        median_s=median,
        p10_s=p10,
        p90_s=p90,
        p99_s=p99,
        images_per_second=case.images / median,
        peak_rss_mib=timed[-1].peak_rss_mib,
        device_peak_mib=timed[-1].device_peak_mib,
        figures=timed[-1].figures,
        clocks=timed[-1].clocks,
        relative_error=error if math.isfinite(error) else None,
        max_error=case.max_error,
        void=void,
        speedup=ratio,
        speedup_interval=interval,
    )


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """||found - expected|| / ||expected||; infinite for another shape, NaN where one has NaNs."""
    if found.shape != expected.shape:
        return math.inf
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
