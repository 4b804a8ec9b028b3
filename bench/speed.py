"""Speed against a plain diffusers loop on the same weights, in turns within one process.

Each round runs every contestant once (A B C, A B C, ...), so that a slow minute of the machine hits
all of them, and a speed-up is a ratio within a round. A row counts only if its final latents agree
with the plain loop's.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from hcma_fast.bench.machine import Machine, describe_machine
from hcma_fast.bench.plain_loop import plain_generate
from hcma_fast.errors import HcmaError, UsageError
from hcma_fast.layout import Layout
from hcma_fast.models.weights import Components, load_components
from hcma_fast.runtime.pipeline import HCMAPipeline

PROMPT = "a dog to the left of a pizza on a green field"
LAYOUT = Layout(["dog", "pizza"], [(0.05, 0.3, 0.45, 0.9), (0.5, 0.5, 0.95, 0.9)])
SEED = 0
PLAIN = "plain diffusers loop"
MAX_ERROR = 1e-3
"""Relative error of the final latents above which a row is void."""

Contestant = Callable[[], Tensor]
"""Generates the batch down to images; returns the final latents."""


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
        UsageError: a number below 1 (steps: below 2).
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
    """
    if batch < 1 or rounds < 1:
        raise UsageError(
            "batch and rounds must be at least 1", value=(batch, rounds), remedy="Use 1 and 5."
        )
    say = progress or (lambda line: None)
    components = load_components(model)
    contestants: dict[str, Contestant] = {
        PLAIN: _plain_contestant(components, num_inference_steps, batch)
    }
    for backend in backends:
        say(f"load {backend}")
        pipe = HCMAPipeline.from_pretrained(
            model, backend=backend, progress=lambda graph, stage: say(f"{stage} {graph}")
        )
        contestants[f"hcma-fast {backend}"] = _our_contestant(pipe, num_inference_steps, batch)
    rows = time_in_turns(contestants, rounds, batch, say)
    peaks = {}
    for backend in backends if memory else ():
        say(f"peak memory, {backend}")
        with tempfile.TemporaryDirectory() as folder:
            command = generate_command(model, backend, num_inference_steps, folder)
            peaks[backend] = peak_rss_mib(command)
    return SpeedReport(
        model=str(model),
        preset=components.preset,
        weights_hash=components.weights_hash,
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


def time_in_turns(
    contestants: Mapping[str, Contestant],
    rounds: int,
    batch: int,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[SpeedRow, ...]:
    """One warm-up each, then ``rounds`` rounds in turns; the first contestant is the yardstick."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    errors = dict.fromkeys(contestants, 0.0)
    for number in range(rounds + 1):
        yardstick: Tensor | None = None
        for name, run in contestants.items():
            say(f"{name}, {f'round {number} of {rounds}' if number else 'warm-up'}")
            start = time.perf_counter()
            latents = run()
            elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed / batch)
            yardstick = latents if yardstick is None else yardstick
            error = float((latents - yardstick).norm() / yardstick.norm())
            # unlike max(), this keeps a NaN
            errors[name] = float(np.maximum(errors[name], error))
    first = np.array(next(iter(seconds.values())))
    return tuple(_row(name, np.array(seconds[name]), first, errors[name]) for name in contestants)


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


def _plain_contestant(components: Components, steps: int, batch: int) -> Contestant:
    seeds = [SEED + i for i in range(batch)]

    def run() -> Tensor:
        prompts, layouts = [PROMPT] * batch, [LAYOUT] * batch
        return plain_generate(components, prompts, layouts, seeds, num_inference_steps=steps)[1]

    return run


def _our_contestant(pipe: HCMAPipeline, steps: int, batch: int) -> Contestant:
    def run() -> Tensor:
        return pipe([PROMPT] * batch, LAYOUT, seed=SEED, num_inference_steps=steps).latents

    return run


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
