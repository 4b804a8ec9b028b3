"""Cases side by side, in turns: machines drift, so what is compared runs in the same minutes.

Each round runs every case of a group once (A B C, C B A, ...) and one at a time, so that a slow
minute of the machine hits all of them, and a speed-up is a ratio within a round. A row counts only
if its result agrees with that of the group's first case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hcma_fast.bench.speed.harness.report import Label, Row, within_rounds
from hcma_fast.bench.speed.harness.round_log import RoundLog
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
    left_out: Mapping[str, str] = field(default_factory=dict)
    """cases that say nothing on this machine, and why"""


def run_group(
    group: Group,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
    failed: dict[str, str] | None = None,
    log: RoundLog | None = None,
    keep: Callable[[tuple[Row, ...]], None] = lambda rows: None,
) -> tuple[Row, ...]:
    """Prepare all cases, load each in a process of its own, then run them in turns.

    Args:
        log: keeps each round, and has those that are not run again.
        keep: called after each round with the rows so far.
        failed: gets the reason of each case that cannot run, and the others go on. Without the
            first case, those that are compared with it have no row, and are in here too. None: a
            failure is raised.

    Raises:
        UsageError: fewer than one round.
        HcmaError, MemoryError, OSError: what a case raised, or that its process died.
    """
    if rounds < 1:
        raise UsageError("rounds must be at least 1", value=rounds, remedy="Use 5.")
    turns = log.turns(group.name) if log is not None else {}
    loaded = log.loaded(group.name) if log is not None else {}
    if log is not None and failed is not None:
        failed |= {f"{group.name}: {name}": why for name, why in log.failed(group.name).items()}
    if log is None or log.finished(group.name) < rounds:
        turns, loaded = _run_rounds(group, turns, loaded, rounds, say, failed, log, keep)
    rows = group_rows(group, turns, loaded)
    first = group.cases[0].name
    judged = {row.name for row in rows}
    for name in [name for name in turns if name not in judged]:
        what = f"it cannot be judged: {first}, which it is compared with, did not run"
        _note(group, name, HcmaError(what, remedy=f"See what {first} lacks."), failed)
    return rows


def _run_rounds(
    group: Group,
    earlier: Mapping[str, list[Run]],
    loaded_before: Mapping[str, Loaded],
    rounds: int,
    say: Callable[[str], None],
    failed: dict[str, str] | None,
    log: RoundLog | None,
    keep: Callable[[tuple[Row, ...]], None],
) -> tuple[dict[str, list[Run]], dict[str, Loaded]]:
    """The rounds that ``earlier`` does not have; all runs, and what was loaded for the first."""
    wanted = [case for case in group.cases if not earlier or case.name in earlier]
    ready = []
    for case in wanted:
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
        loaded = {name: one.loaded for name, one in workers.items()} | dict(loaded_before)

        def finish(number: int, turns: Mapping[str, Sequence[Run]], ran: Sequence[str]) -> None:
            if log is not None:
                begin = f"{group.name}: "
                noted = (failed or {}).items()
                lost = {k.removeprefix(begin): v for k, v in noted if k.startswith(begin)}
                log.add(group.name, number, {name: turns[name][-1] for name in ran}, loaded, lost)
            if number:
                keep(group_rows(group, turns, loaded))

        kept = [case for case in group.cases if case.name in workers]
        turns = take_turns(group, kept, workers, rounds, say, failed, earlier, finish)
    return turns, {name: loaded[name] for name in turns}


def take_turns(
    group: Group,
    cases: Sequence[Case],
    workers: Mapping[str, Callable[[], Run]],
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
    failed: dict[str, str] | None = None,
    earlier: Mapping[str, Sequence[Run]] | None = None,
    finish: Callable[[int, Mapping[str, Sequence[Run]], Sequence[str]], None] | None = None,
) -> dict[str, list[Run]]:
    """A warm-up each, then ``rounds`` rounds; returns the runs by name, the warm-up first.

    Every other round goes backwards, so that nobody always runs after the same other. A case
    without a warm-up has one run less.

    Args:
        earlier: runs of the first rounds, which are not run again; the warm-up of a new process
            is, and is not counted.
        finish: called after each round with its number, all runs, and the names that ran in it.
    """
    before = earlier or {}
    turns: dict[str, list[Run]] = {case.name: [*before.get(case.name, ())] for case in cases}
    done = max((len(turns[c.name]) - c.warm_up for c in cases if turns[c.name]), default=-1)
    seconds: dict[str, float] = {}
    for number in (*((0,) if done >= 0 else ()), *range(done + 1, rounds + 1)):
        again = done >= 0 and not number
        ran = []
        for case in reversed(cases) if number % 2 else cases:
            if case.name not in turns or not (number or case.warm_up):
                continue
            what = f"round {number} of {rounds}" if number else "warm-up"
            say(f"{case.name}, {what}{_time_left(seconds, number, rounds)}")
            started = time.perf_counter()
            try:
                run = workers[case.name]()
            except (HcmaError, MemoryError, OSError) as error:
                _note(group, case.name, error, failed)
                del turns[case.name]
                continue
            seconds[case.name] = time.perf_counter() - started
            if not again:
                turns[case.name].append(run)
                ran.append(case.name)
        if finish is not None and not again:
            finish(number, turns, [name for name in ran if name in turns])
    return turns


def _time_left(seconds: Mapping[str, float], number: int, rounds: int) -> str:
    """In words, by the last run of each case; nothing before the first round."""
    if not number or not seconds:
        return ""
    return f", about {in_words(sum(seconds.values()) * (rounds + 1 - number))} left of this group"


def in_words(seconds: float) -> str:
    """A duration for a reader."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
