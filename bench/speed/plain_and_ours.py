"""Speed against a plain diffusers loop on the same weights, in turns, a process for each."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hcma_fast.bench.shared.machine import describe_machine
from hcma_fast.bench.shared.memory import peak_rss_mib
from hcma_fast.bench.speed.harness.contestants import (
    LAYOUT,
    PROMPT,
    SEED,
    Ours,
    Work,
    build_missing,
    load_ours,
    load_plain,
)
from hcma_fast.bench.speed.harness.report import Report
from hcma_fast.bench.speed.harness.rounds import Case, Group, run_group
from hcma_fast.errors import UsageError
from hcma_fast.sampling.solvers import plms

PLAIN = "plain diffusers loop"


def plain_case(model: str, work: Work, device: str = "cpu") -> Case:
    """The yardstick of most groups."""
    load = partial(load_plain, model, work, device)
    return Case(PLAIN, load, work.labels, work.batch)


def ours_case(
    model: str, ours: Ours, work: Work, device: str = "cpu", name: str | None = None
) -> Case:
    """Our pipeline; its engines are built where they are missing."""
    return Case(
        name or f"hcma-fast {ours.label}",
        partial(load_ours, model, ours, work, device),
        work.labels,
        work.batch,
        ours.max_error,
        prepare=partial(build_missing, model, ours, work.side, device=device),
    )


def measure_speed(
    model: str | Path = "tiny",
    *,
    backends: Sequence[str] = ("eager", "onnxruntime"),
    num_inference_steps: int = 50,
    batch: int = 1,
    rounds: int = 5,
    device: str = "cpu",
    memory: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Time the plain loop and our pipeline on each backend; build missing engines first.

    Args:
        device: of all of them.
        memory: also start a process per backend that loads the model and generates one image; its
            peak memory is the figure ``generate_peak_mib`` of the row.
        progress: called with a line of text before each run.

    Raises:
        UsageError: a number below 1, or a number of steps that cannot be sampled.
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
        HcmaError: a contestant's process died.
    """
    if batch < 1:
        raise UsageError("batch must be at least 1", value=batch, remedy="Use 1.")
    plms(num_inference_steps)  # refuses bad steps before anything is loaded
    say = progress or (lambda line: None)
    work = Work(num_inference_steps, batch)
    cases = [ours_case(str(model), Ours(backend), work, device) for backend in backends]
    group = Group("against the plain loop", [plain_case(str(model), work, device), *cases])
    rows = list(run_group(group, rounds, say))
    for place, backend in enumerate(backends if memory else (), 1):
        say(f"peak memory, {backend}")
        with tempfile.TemporaryDirectory() as folder:
            command = generate_command(model, backend, num_inference_steps, folder, device)
            peak = {"generate_peak_mib": peak_rss_mib(command)}
        rows[place] = rows[place].model_copy(update={"figures": rows[place].figures | peak})
    return Report(
        suite="speed",
        model=str(model),
        device=device,
        rounds=rounds,
        quick=False,
        rows=tuple(rows),
        machine=describe_machine(clocks=False),
    )


def generate_command(
    model: str | Path, backend: str, steps: int, out: str, device: str = "cpu"
) -> list[str]:
    """``hcma-fast generate`` of the benchmark's scene, as a command of this interpreter."""
    command = [sys.executable, "-m", "hcma_fast.cli.app", "generate", "--prompt", PROMPT]
    for phrase, box in zip(LAYOUT.phrases, LAYOUT.boxes, strict=True):
        command += ["--box", f"{phrase}:{','.join(map(str, box))}"]
    options = {"model": model, "backend": backend, "steps": steps, "seed": SEED, "out": out}
    options["device"] = device
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return command
