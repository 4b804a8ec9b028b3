"""The suites of ``hcma-fast bench run``: which cases, side by side, at which sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hcma_fast.bench.shared.machine import describe_machine
from hcma_fast.bench.speed.harness.contestants import SD14, weights_hash_of
from hcma_fast.bench.speed.harness.plan import Plan, extent, side_by_side
from hcma_fast.bench.speed.harness.report import Report, Row
from hcma_fast.bench.speed.harness.round_log import RoundLog, SuiteKey
from hcma_fast.bench.speed.harness.rounds import Group, in_words, run_group
from hcma_fast.bench.speed.plain_and_ours import ours_case, plain_case
from hcma_fast.bench.speed.suites.kernel_times import kernels
from hcma_fast.bench.speed.suites.ladder import ladder
from hcma_fast.bench.speed.suites.overhead import overhead
from hcma_fast.bench.speed.suites.peers import half_case, peers
from hcma_fast.bench.speed.suites.scaling import fit_scaling, scaling
from hcma_fast.bench.speed.suites.stages import align, build, unet
from hcma_fast.bench.speed.suites.training import train
from hcma_fast.errors import BackendError, UsageError
from hcma_fast.runtime.arguments import check_device


def latency(plan: Plan) -> list[Group]:
    """Batch 1; loading and the first run are the time to the first image."""
    work = plan.work()
    cases = [plain_case(plan.model, work, plan.device)]
    # as it is deployed: on a GPU also captured
    cases += [ours_case(plan.model, ours, work, plan.device) for ours in plan.deployed]
    return side_by_side(plan, "latency", cases)


def throughput(plan: Plan) -> list[Group]:
    """Batches, steps and numbers of boxes."""
    if plan.quick:
        sizes = [(2, 4, 2)]
    elif plan.model == SD14:
        sizes = [(batch, 50, 2) for batch in (1, 2, 4)]
    elif plan.on_gpu:
        # a card is there for 20 minutes, and each case loads for some seconds
        sizes = [(batch, 50, 2) for batch in (1, 8, 32)] + [(8, 20, boxes) for boxes in (0, 2, 30)]
    else:
        sizes = [(batch, steps, 2) for steps in (20, 50) for batch in (1, 2, 4, 8, 16, 32)]
        sizes += [(8, 20, boxes) for boxes in (0, 8, 30)]
    groups: list[Group] = []
    for batch, steps, boxes in sizes:
        work = plan.work(batch, steps=steps, boxes=boxes)
        cases = [plain_case(plan.model, work, plan.device)]
        # which is what one would write there, and what ours are to be measured by
        cases += [half_case(plan, work)] if plan.on_gpu else []
        cases += [ours_case(plan.model, ours, work, plan.device) for ours in plan.leading]
        groups += side_by_side(plan, f"batch {batch}, {extent(work)}, {boxes} boxes", cases)
    return groups


#: by name: its groups, and how many rounds they get
SUITES: dict[str, tuple[Callable[[Plan], list[Group]], int]] = {
    "latency": (latency, 10),
    "throughput": (throughput, 3),
    "peers": (peers, 5),
    "ladder": (ladder, 5),
    "scaling": (scaling, 5),
    "align": (align, 10),
    "unet": (unet, 5),
    "build": (build, 1),
    "train": (train, 3),
    "overhead": (overhead, 10),
    "kernels": (kernels, 5),
}
ON_GPU = ("kernels",)
"""Suites that a CPU cannot run"""
ONCE = ("build",)
"""Suites whose cases run once, whatever is asked for: they take minutes, and hardly vary"""


def check_suites(names: Sequence[str], plan: Plan) -> None:
    """Refuse what cannot run, before the first suite does.

    Raises:
        UsageError: an unknown suite, or one twice, or an unknown device or backend.
        BackendError: a backend that lacks the precision, no such device, or a suite
            that this device cannot run.
        WeightsError: no such model.
    """
    for name in names:
        if name not in SUITES:
            remedy = f"Suites: {', '.join(SUITES)}; or all."
            raise UsageError("unknown suite", value=name, remedy=remedy)
        if name in ON_GPU and not plan.on_gpu:
            raise BackendError(
                "this suite needs an NVIDIA GPU",
                value=name,
                remedy="Use --device cuda; hcma-fast bench kernels --offline counts without one.",
            )
    if len(set(names)) < len(names):
        raise UsageError("a suite is named twice", value=list(names), remedy="Name it once.")
    check_device(plan.device, "eager")
    _ = plan.chosen  # refuses unknown ones
    weights_hash_of(plan.model)


def run_suite(
    name: str,
    plan: Plan,
    progress: Callable[[str], None] = lambda line: None,
    *,
    rounds_file: Path | None = None,
    resume: bool = False,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run a suite; a case that cannot run is in the report's ``failed``, and the others go on.

    Args:
        name: one that :func:`check_suites` has seen.
        progress: called with a line of text before each run.
        rounds_file: keeps each finished round, and is deleted at the end.
        resume: go on after the rounds of that file.
        keep: called after each round with the report so far.

    Raises:
        InputError: the file's rounds are of another plan, machine or commit.
    """
    groups, usual = SUITES[name]
    rounds = 1 if name in ONCE else plan.rounds or (1 if plan.quick else usual)
    machine = describe_machine(clocks=False)
    key = SuiteKey(
        suite=name,
        model=plan.model,
        device=plan.device,
        backends=plan.backends,
        rounds=rounds,
        quick=plan.quick,
        cpu=machine.cpu,
        commit=machine.commit,
    )
    log = RoundLog(rounds_file, key, resume=resume)
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}

    def report(rows: Sequence[Row], *, finished: bool) -> Report:
        return Report(
            suite=name,
            model=plan.model,
            device=plan.device,
            rounds=rounds,
            quick=plan.quick,
            rows=tuple(rows),
            failed=dict(failed),
            left_out=dict(left_out),
            finished=finished,
            fits=fit_scaling(rows) if finished and name == "scaling" else (),
            machine=describe_machine(clocks=False),
        )

    rows: list[Row] = []
    planned, started = groups(plan), time.perf_counter()
    for number, group in enumerate(planned):
        for case, why in group.left_out.items():
            left_out[f"{group.name}: {case}"] = why
            progress(f"left out: {case}: {why}")
        left = (time.perf_counter() - started) / (number or 1) * (len(planned) - number)
        about = f", about {in_words(left)} left of this suite" if number else ""
        progress(f"group {number + 1} of {len(planned)}, {group.name}{about}")

        def keep_rows(some: tuple[Row, ...], before: tuple[Row, ...] = tuple(rows)) -> None:
            keep(report([*before, *some], finished=False))

        rows += run_group(group, rounds, progress, failed, log, keep_rows)
    finished = report(rows, finished=True)
    # on the disk before the rounds go
    keep(finished)
    log.close()
    return finished
