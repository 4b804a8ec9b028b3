"""Runs the stages in order of value, each in a process of its own with a time limit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hcma_fast.bench.gpu_check.records import (
    CUT_OFF,
    FAILED,
    OK,
    WAITING,
    Check,
    StageRecord,
    load_check,
)
from hcma_fast.errors import InputError

BUDGET_S = 480.0
"""Of one call: ten minutes on a lent machine hold its start and the copies too"""
_GRACE_S = 3.0
_LOG_TAIL = 1500
Command = Callable[[str, Path, str], list[str]]
"""From a stage, the file for its lines and the order of its cases, the process to start"""


@dataclass(frozen=True)
class Stage:
    """One stage and the most time that it may take in one call."""

    name: str
    limit_s: float
    environment: tuple[tuple[str, str], ...] = ()


STAGES = (
    Stage("doctor", 45),
    Stage("kernels", 55),
    Stage("tiny", 110),
    Stage("unet", 145),
    Stage("pipeline", 85),
    Stage("roofline", 40),
)
"""In order of value: what comes first says whether the rest means anything"""


def stages_for(device: str) -> tuple[Stage, ...]:
    """:data:`STAGES`; on a CPU Triton's interpreter runs the kernels."""
    if device != "cpu":
        return STAGES
    interpreted = (("TRITON_INTERPRET", "1"),)
    return tuple(
        Stage(stage.name, stage.limit_s, interpreted) if stage.name == "kernels" else stage
        for stage in STAGES
    )


def run_check(
    out: Path,
    *,
    device: str = "cuda",
    small: bool = False,
    again: bool = False,
    stages: Sequence[Stage] | None = None,
    budget_s: float = BUDGET_S,
    command: Command | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Check:
    """Run what is not finished yet, and write ``out`` after each stage.

    A case that failed or was cut off is tried again by the next call, after all others of its
    stage: what hangs must not keep the rest from running.

    Args:
        small: small sizes, to show that every case works.
        again: forget what is in ``out``.
        stages: those to run, by default all; command: starts a stage's process.
        budget_s: most seconds of this call.

    Raises:
        InputError: ``out`` is something else, or of another device, size or GPU.
    """
    gpu = gpu_here()
    check = Check(device, small, gpu, datetime.now(UTC).isoformat(timespec="seconds"))
    if out.exists() and not again:
        check = load_check(out)
        if (check.device, check.small, check.gpu) != (device, small, gpu):
            raise InputError(
                "this result is of another device, size or GPU",
                value=f"{check.device}, {'small' if check.small else 'full'}, {check.gpu}",
                remedy="Give another file with --out, or start anew with --again.",
            )
    started = time.monotonic()
    before = check.seconds
    for stage in stages_for(device) if stages is None else stages:
        record = check.stages.setdefault(stage.name, StageRecord())
        record.limit_s = stage.limit_s
        left = budget_s - (time.monotonic() - started)
        if record.state == OK:
            say(f"{stage.name}: done in an earlier call")
        elif left <= 0:
            say(f"{stage.name}: no time is left in this call")
        else:
            limit_s = min(stage.limit_s, left)
            try:
                _run_stage(stage, record, limit_s, out, command or _worker(check, out))
            finally:
                check.seconds = round(before + time.monotonic() - started, 1)
                check.save(out)
            say(describe_stage(stage.name, record))
    check.save(out)
    return check


def _worker(check: Check, out: Path) -> Command:
    def command(stage: str, part: Path, order: str) -> list[str]:
        words = [sys.executable, "-m", "hcma_fast.bench.gpu_check.worker", stage]
        words += ["--device", check.device, "--part", str(part), "--result", str(out)]
        return [*words, "--order", order, *(["--small"] if check.small else [])]

    return command


def _run_stage(
    stage: Stage, record: StageRecord, limit_s: float, out: Path, command: Command
) -> None:
    """One process: what it wrote is kept, however it ends."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".gpu-check-", dir=out.parent) as folder:
        part, log = Path(folder) / "part.jsonl", Path(folder) / "log.txt"
        # finished cases are left out; those that were cut off or failed come last
        order = json.dumps(
            {"done": record.names(OK), "last": [*record.names(FAILED), *record.names(CUT_OFF)]}
        )
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command(stage.name, part, order),
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONSAFEPATH": "1", **dict(stage.environment)},
                process_group=0,
            )
            code: int | None = None
            try:
                code = process.wait(limit_s)
                record.error = None
            except subprocess.TimeoutExpired:
                record.error = f"cut off after {limit_s:.0f} s"
            finally:
                # also where the check itself is interrupted
                _end(process)
                lines = part.read_text(encoding="utf-8").splitlines() if part.exists() else []
                record.read_part(lines)
                record.seconds = round(record.seconds + time.monotonic() - started, 1)
        if code is not None and (code or record.state == CUT_OFF):
            tail = log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:].strip()
            record.state = FAILED
            record.error = f"the process ended with {code}: {tail or 'no output'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the stage's process and its children, such as compilers: its process group alone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        os.killpg(process.pid, number)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def gpu_here() -> str | None:
    """Name and driver of the GPUs, by nvidia-smi; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(line.strip() for line in done.stdout.splitlines()) or None


def describe_stage(name: str, record: StageRecord) -> str:
    """What became of a stage, one line for each case that did not work."""
    done = f"{len(record.names(OK))} of {len(record.cases)} cases" if record.cases else "no case"
    lines = [f"{name}: {done} in {record.seconds:.0f} s (limit {record.limit_s:.0f} s)"]
    if record.error is not None:
        lines.append(f"  {record.error}")
    for state in (FAILED, CUT_OFF, WAITING):
        for case in record.names(state):
            why = record.cases[case].get("error")
            lines.append(f"  {state}: {case}" + (f" ({why})" if why else ""))
    return "\n".join(lines)
