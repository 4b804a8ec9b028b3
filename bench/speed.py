"""Speed against a plain diffusers loop on the same weights, in turns, a process for each.

Each round runs every contestant once (A B C, C B A, ...) and one at a time, so that a slow minute
of the machine hits all of them, and a speed-up is a ratio within a round. A row counts only if its
final latents agree with the plain loop's.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hcma_fast.bench.contestants import (
    LAYOUT,
    PROMPT,
    SEED,
    Run,
    load_ours,
    load_plain,
    worker,
)
from hcma_fast.bench.machine import Machine, describe_machine
from hcma_fast.config import BACKENDS
from hcma_fast.errors import HcmaError, UsageError
from hcma_fast.layout import Layout
from hcma_fast.schedule import plms_table

PLAIN = "plain diffusers loop"
MAX_ERROR = 1e-3
"""Relative error of the final latents above which a row is void."""


class SpeedRow(BaseModel):
    """One contestant. Seconds are per image; the speed-up is against the plain loop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seconds: tuple[float, ...]
    median_s: float
    p10_s: float
    p90_s: float
    relative_error: float | None
    """of the final latents to the plain loop's, the worst round; None when not finite"""
    void: bool
    """the latents do not agree: the timings mean nothing, and there is no speed-up"""
    speedup: float | None
    """median over the rounds"""
    speedup_interval: tuple[float, float] | None
    """10th and 90th percentile over the rounds"""


class SpeedReport(BaseModel):
    """What :func:`measure_speed` found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    preset: str
    weights_hash: str
    num_inference_steps: int
    batch: int
    rounds: int
    prompt: str
    layout: Layout
    seed: int
    rows: tuple[SpeedRow, ...]
    generate_peak_rss_mib: dict[str, float]
    """peak memory of a process that loads the model and generates one image, by backend"""
    machine: Machine


def measure_speed(
    model: str | Path = "tiny",
    *,
    backends: Sequence[str] = ("eager", "onnxruntime"),
    num_inference_steps: int = 50,
    batch: int = 1,
    rounds: int = 5,
    memory: bool = True,
    progress: Callable[[str], None] | None = None,
) -> SpeedReport:
    """Time the plain loop and our pipeline on each backend; build missing engines first.

    Args:
        memory: also start a process per backend to measure its peak memory.
        progress: called with a line of text before each run.

    Raises:
        UsageError: a number below 1, or a number of steps that cannot be sampled.
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
        HcmaError: a contestant's process died.
    """
    if batch < 1 or rounds < 1:
        raise UsageError(
            "batch and rounds must be at least 1", value=(batch, rounds), remedy="Use 1 and 5."
        )
    plms_table(num_inference_steps)  # refuses bad steps before anything is loaded
    say = progress or (lambda line: None)
    loads = {PLAIN: partial(load_plain, model, num_inference_steps, batch)}
    for backend in backends:
        _build_missing(model, backend, say)
        loads[f"hcma-fast {backend}"] = partial(
            load_ours, model, backend, num_inference_steps, batch
        )
    with ExitStack() as stack:
        workers = {}
        for name, load in loads.items():
            say(f"load {name}")
            workers[name] = stack.enter_context(worker(name, load))
        rows = time_in_turns(workers, rounds, batch, say)
    peaks = {}
    for backend in backends if memory else ():
        say(f"peak memory, {backend}")
        with tempfile.TemporaryDirectory() as folder:
            command = generate_command(model, backend, num_inference_steps, folder)
            peaks[backend] = peak_rss_mib(command)
    return SpeedReport(
        model=str(model),
        preset=workers[PLAIN].preset,
        weights_hash=workers[PLAIN].weights_hash,
        num_inference_steps=num_inference_steps,
        batch=batch,
        rounds=rounds,
        prompt=PROMPT,
        layout=LAYOUT,
        seed=SEED,
        rows=rows,
        generate_peak_rss_mib=peaks,
        machine=describe_machine(),
    )


def _build_missing(model: str | Path, backend: str, say: Callable[[str], None]) -> None:
    """Build here: the process that is timed must not be one that exported and validated."""
    if backend not in BACKENDS or backend == "eager":
        return
    from hcma_fast.export.cache import engine_folder
    from hcma_fast.export.target import Target
    from hcma_fast.models.weights import locate

    engine_folder(
        locate(model),
        Target(backend=backend),
        progress=lambda graph, stage: say(f"{stage} {graph}"),
    )


def time_in_turns(
    contestants: Mapping[str, Callable[[], Run]],
    rounds: int,
    batch: int,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[SpeedRow, ...]:
    """One warm-up each, then ``rounds`` rounds in turns; the first contestant is the yardstick.

    Every other round goes backwards, so that nobody always runs after the same other.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    errors = dict.fromkeys(names, 0.0)
    for number in range(rounds + 1):
        runs: dict[str, Run] = {}
        for name in reversed(names) if number % 2 else names:
            say(f"{name}, {f'round {number} of {rounds}' if number else 'warm-up'}")
            runs[name] = contestants[name]()
        yardstick = runs[names[0]].latents
        for name, run in runs.items():
            if number:
                seconds[name].append(run.seconds / batch)
            error = float(np.linalg.norm(run.latents - yardstick) / np.linalg.norm(yardstick))
            # unlike max(), this keeps a NaN
            errors[name] = float(np.maximum(errors[name], error))
    first = np.array(seconds[names[0]])
    return tuple(_row(name, np.array(seconds[name]), first, errors[name]) for name in names)


def _row(
    name: str, seconds: NDArray[np.float64], yardstick: NDArray[np.float64], error: float
) -> SpeedRow:
    finite = math.isfinite(error)
    void = not finite or error > MAX_ERROR
    p10, median, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
    low, ratio, high = np.percentile(yardstick / seconds, [10, 50, 90]).tolist()
    return SpeedRow(
        name=name,
        seconds=tuple(seconds.tolist()),
        median_s=median,
        p10_s=p10,
        p90_s=p90,
        relative_error=error if finite else None,
        void=void,
        speedup=None if void else ratio,
        speedup_interval=None if void else (low, high),
    )


def generate_command(model: str | Path, backend: str, steps: int, out: str) -> list[str]:
    """``hcma-fast generate`` of the benchmark's scene, as a command of this interpreter."""
    command = [sys.executable, "-m", "hcma_fast.cli.app", "generate", "--prompt", PROMPT]
    for phrase, box in zip(LAYOUT.phrases, LAYOUT.boxes, strict=True):
        command += ["--box", f"{phrase}:{','.join(map(str, box))}"]
    options = {"model": model, "backend": backend, "steps": steps, "seed": SEED, "out": out}
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return command


#: A child's peak includes that of the process it was forked from, at the moment of exec. So a small
#: process in between starts the command and reports what its only child used.
_RSS_PROBE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def peak_rss_mib(command: Sequence[str]) -> float:
    """Peak resident memory of ``command``, in MiB.

    Raises:
        HcmaError: the command failed; the end of what it wrote to stderr is in the message.
    """
    probe = [sys.executable, "-S", "-c", _RSS_PROBE, *command]
    # in a checkout, the working folder's kernels/ must not be taken for the package of that name
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(probe, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise HcmaError(
            f"the process whose memory was to be measured failed: {done.stderr.strip()[-300:]}",
            value=done.returncode,
            remedy="Run it by hand, or leave the memory out (--no-memory).",
        )
    # macOS counts in bytes, Linux in KiB
    return float(int(done.stdout) / (2**20 if sys.platform == "darwin" else 2**10))
