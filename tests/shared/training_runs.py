"""What tests of the stages of training share: runs in processes of their own, their logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

#: a test module's run() as a program of its own; with a number it kills itself after that step
PROGRAM = """
import importlib.util, json, os, signal, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("this_test", sys.argv[1])
this_test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(this_test)

def progress(done, total, record):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

changes = json.loads(sys.argv[3])
this_test.run(*map(Path, sys.argv[4:]), progress=progress, **changes)
"""


def run_as_process(
    file: str,
    stop: int,
    paths: Sequence[Path],
    launcher: Sequence[str] = (),
    **changes: float | None,
) -> subprocess.CompletedProcess[str]:
    """``run(*paths, **changes)`` of the test module ``file``; it kills itself after step ``stop``.

    Args:
        launcher: modules and options that start it as several; the program is a file then, beside
            the last of ``paths``.
    """
    program = ["-c", PROGRAM]
    if launcher:
        place = paths[-1].parent / "program.py"
        place.write_text(PROGRAM)
        program = ["-m", *launcher, str(place)]
    return subprocess.run(
        [sys.executable, *program, file, str(stop), json.dumps(changes), *map(str, paths)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@contextmanager
def configured_accelerate() -> Iterator[None]:
    """What ``accelerate launch`` sets for a user whose configuration says so.

    accelerate reads its environment once, so it forgets its state at both ends.
    """
    settings = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            # the test would prove nothing where it is not read
            assert Accelerator(cpu=True).mixed_precision == "bf16"
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def records(work: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def untimed(work: Path) -> list[dict[str, Any]]:
    """The log without what depends on the machine's mood."""
    timed = ("samples_per_second", "data_wait_share")
    return [{k: v for k, v in record.items() if k not in timed} for record in records(work)]


def same(first: Path, second: Path) -> bool:
    """Do two files of weights hold the same bits?"""
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def plain_descent(*, wanted: bool) -> Iterator[None]:
    """Stages take SGD, whose steps are as long as the gradient is: Adam's hide a wrong scale."""

    def descent(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay)

    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr("torch.optim.Adam", descent)
            patch.setattr("torch.optim.AdamW", descent)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Bits may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
