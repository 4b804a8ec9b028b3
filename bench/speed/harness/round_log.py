"""Finished rounds of a suite, in a file: an interrupted suite goes on after its last round.

A line for each round of a group, which is whole or is not there. What is compared within a round
ran in the same minutes, so part of a round is of no use.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from hcma_fast.bench.shared.clocks import Clocks
from hcma_fast.bench.speed.harness.workers import Loaded, Run
from hcma_fast.errors import InputError
from hcma_fast.files import append_line, read_text, write_whole

_MOST_BYTES = 2**32


class SuiteKey(BaseModel):
    """What must be the same for rounds to belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str
    model: str
    device: str
    backends: tuple[str, ...]
    rounds: int
    quick: bool
    cpu: str
    commit: str | None


class _Run(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    seconds: float
    result: str
    shape: tuple[int, ...]
    peak_rss_mib: float
    device_peak_mib: float | None
    figures: dict[str, float]
    clocks: Clocks
    preset: str
    weights_hash: str
    load_s: float

    @classmethod
    def of(cls, run: Run, loaded: Loaded) -> _Run:
        result = np.ascontiguousarray(run.result, np.float32)
        return cls(
            seconds=run.seconds,
            result=base64.b64encode(result.tobytes()).decode(),
            shape=result.shape,
            peak_rss_mib=run.peak_rss_mib,
            device_peak_mib=run.device_peak_mib,
            figures=run.figures,
            clocks=run.clocks,
            preset=loaded.preset,
            weights_hash=loaded.weights_hash,
            load_s=loaded.load_s,
        )

    def run(self) -> Run:
        result = np.frombuffer(base64.b64decode(self.result), np.float32).reshape(self.shape)
        return Run(
            self.seconds,
            result,
            self.peak_rss_mib,
            self.device_peak_mib,
            dict(self.figures),
            self.clocks,
        )


class _Round(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    group: str
    number: int
    """0 for the warm-up"""
    runs: dict[str, _Run]
    """empty for a case that has no warm-up"""
    failed: dict[str, str]
    """of the group's cases so far, and why"""


class RoundLog:
    """The rounds of one suite. Without a path, nothing is kept."""

    def __init__(self, path: Path | None, key: SuiteKey, *, resume: bool) -> None:
        """Go on with the file, or begin it anew.

        Raises:
            InputError: to go on, and the file is damaged or of another suite.
            OutputError: it cannot be written.
        """
        self._path = path
        self._rounds: dict[str, list[_Round]] = {}
        if path is None:
            return
        header = key.model_dump_json()
        if resume and path.is_file():
            self._read(path, key)
        else:
            write_whole(path, lambda file: file.write(f"{header}\n".encode()))

    def _read(self, path: Path, key: SuiteKey) -> None:
        text = read_text(path, "the file of finished rounds", limit=_MOST_BYTES)
        # the end of a line that was being written when the process was killed
        whole = text[: text.rfind("\n") + 1].splitlines()
        try:
            there = SuiteKey.model_validate_json(whole[0] if whole else "")
            rounds = [_Round.model_validate_json(line) for line in whole[1:]]
        except ValidationError as error:
            raise InputError(
                "the finished rounds cannot be read",
                value=str(path),
                remedy="Leave out --resume to measure all of them again.",
            ) from error
        for name in SuiteKey.model_fields:
            if getattr(there, name) != getattr(key, name):
                raise InputError(
                    f"the finished rounds are of another {name}: {getattr(there, name)}, not "
                    f"{getattr(key, name)}",
                    value=str(path),
                    remedy="Give the options of the run that was interrupted, or leave out "
                    "--resume to measure all rounds again.",
                )
        write_whole(path, lambda file: file.write("".join(f"{x}\n" for x in whole).encode()))
        for one in rounds:
            self._rounds.setdefault(one.group, []).append(one)

    def finished(self, group: str) -> int:
        """Rounds of the group that are there, the warm-up not counted."""
        return max((one.number for one in self._rounds.get(group, ())), default=0)

    def turns(self, group: str) -> dict[str, list[Run]]:
        """The runs of those cases of the group that have not failed, the warm-up first."""
        rounds = self._rounds.get(group, [])
        names = rounds[-1].runs if rounds else {}
        return {name: [r.runs[name].run() for r in rounds if name in r.runs] for name in names}

    def loaded(self, group: str) -> dict[str, Loaded]:
        """What the cases loaded, in the process of their first run."""
        found: dict[str, Loaded] = {}
        for one in self._rounds.get(group, []):
            for name, run in one.runs.items():
                found.setdefault(name, Loaded(run.preset, run.weights_hash, run.load_s))
        return found

    def failed(self, group: str) -> dict[str, str]:
        """Cases of the group that could not run, and why."""
        rounds = self._rounds.get(group, [])
        return dict(rounds[-1].failed) if rounds else {}

    def add(
        self,
        group: str,
        number: int,
        runs: Mapping[str, Run],
        loaded: Mapping[str, Loaded],
        failed: Mapping[str, str],
    ) -> None:
        """Keep a round.

        Raises:
            OutputError: the file cannot be written.
        """
        kept = {name: _Run.of(run, loaded[name]) for name, run in runs.items()}
        one = _Round(group=group, number=number, runs=kept, failed=dict(failed))
        self._rounds.setdefault(group, []).append(one)
        if self._path is not None:
            append_line(self._path, one.model_dump_json())

    def close(self) -> None:
        """The suite is finished: its report has all that is in the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
