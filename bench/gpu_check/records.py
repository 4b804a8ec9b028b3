"""The one JSON of a check: its stages, their cases, and what became of each.

Standard library only, as in :mod:`.runner`: a library that is missing or broken must end one stage,
not the check.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcma_fast.errors import InputError

KIND, VERSION = "gpu-check", 1
OK, FAILED, CUT_OFF, WAITING = "ok", "failed", "cut off", "not reached"
"""States of a case, and of a stage"""


@dataclass
class StageRecord:
    """One stage: all its cases by name, in the order in which they ran."""

    state: str = WAITING
    seconds: float = 0.0
    """of all calls together"""
    limit_s: float = 0.0
    error: str | None = None
    """of the stage itself, such as a library that cannot be imported"""
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """state, seconds, figures or error of each"""

    def names(self, state: str) -> list[str]:
        """Cases in this state."""
        return [name for name, case in self.cases.items() if case["state"] == state]

    def read_part(self, lines: list[str]) -> None:
        """Take over what a worker wrote before it ended or was ended."""
        ended = False
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a process that was ended while it wrote
            if "cases" in entry:
                known = {name: self.cases.get(name, {"state": WAITING}) for name in entry["cases"]}
                self.cases = known
            elif "begin" in entry:
                self.cases[entry["begin"]] = {"state": CUT_OFF}
            elif "case" in entry:
                self.cases[entry.pop("case")] = entry
            else:
                ended = bool(entry.get("end"))
        if not ended:
            self.state = CUT_OFF
        elif all(case["state"] == OK for case in self.cases.values()):
            self.state = OK
        else:
            self.state = FAILED


@dataclass
class Check:
    """All that is known so far."""

    device: str
    small: bool
    gpu: str | None
    """name and driver, by nvidia-smi"""
    started: str
    seconds: float = 0.0
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        data = {"kind": KIND, "version": VERSION, **vars(self)}
        data["stages"] = {name: vars(stage) for name, stage in self.stages.items()}
        partial = path.with_name(f".{path.name}.part")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def load_check(path: Path) -> Check:
    """What an earlier call left.

    Raises:
        InputError: it cannot be read, or is no result of a GPU check.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data.pop("kind"), data.pop("version")) != (KIND, VERSION):
            raise ValueError("another kind or version")
        stages = {name: StageRecord(**stage) for name, stage in data.pop("stages").items()}
        return Check(**data, stages=stages)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"this is no result of the GPU check ({error})",
            value=str(path),
            remedy="Give another file with --out, or start anew with --again.",
        ) from error
