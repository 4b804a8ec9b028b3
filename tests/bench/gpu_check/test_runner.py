"""The runner: time limits, what fails, what is left, and a second call; no stage needs torch."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from hcma_fast.bench.gpu_check import runner
from hcma_fast.bench.gpu_check.records import CUT_OFF, FAILED, OK, WAITING, Check, load_check
from hcma_fast.bench.gpu_check.runner import BUDGET_S, STAGES, Stage, run_check, stages_for
from hcma_fast.errors import InputError

#: a stage's process: notes its order; case "slow" waits, "bad" fails once, "die" ends the process
WORKER = """
import json, os, pathlib, sys, time
part, order, log, *cases = sys.argv[1:]
order = json.loads(order)
with open(log, "a") as stream:
    stream.write(json.dumps(order) + chr(10))
again = sum(1 for line in open(log)) > 1
def write(entry):
    with open(part, "a") as stream:
        stream.write(json.dumps(entry) + chr(10))
write({"cases": cases})
waiting = sorted((c for c in cases if c not in order["done"]), key=lambda c: c in order["last"])
for case in waiting:
    write({"begin": case})
    if case == "slow" and not again:
        print(os.getpid(), file=open(log + ".pid", "w"), flush=True)
        time.sleep(60)
    if case == "die":
        sys.exit("no such library")
    bad = case == "bad" and not again
    write({"case": case, **({"state": "failed", "error": "wrong"} if bad else
                            {"state": "ok", "figures": {"at": waiting.index(case)}})})
write({"end": True})
"""


class Workers:
    """Starts the process above with the cases of each stage."""

    def __init__(self, folder: Path, **cases: str) -> None:
        self.folder, self.cases = folder, cases

    def __call__(self, stage: str, part: Path, order: str) -> list[str]:
        log = str(self.folder / f"{stage}.log")
        words = [sys.executable, "-S", "-c", WORKER, str(part), order, log]
        return [*words, *self.cases[stage].split()]

    def orders(self, stage: str) -> list[dict[str, list[str]]]:
        lines = (self.folder / f"{stage}.log").read_text().splitlines()
        return [json.loads(line) for line in lines]


def check(workers: Workers, limit_s: float = 30, **options: float) -> Check:
    stages = [Stage(name, limit_s) for name in workers.cases]
    out = workers.folder / "found.json"
    return run_check(out, device="cpu", stages=stages, command=workers, **options)  # type: ignore[arg-type]


def states(found: Check, stage: str) -> dict[str, str]:
    return {name: case["state"] for name, case in found.stages[stage].cases.items()}


def test_what_fails_is_said_and_the_next_stage_runs(tmp_path: Path) -> None:
    workers = Workers(tmp_path, one="a bad c", two="die b", three="d")
    said: list[str] = []
    found = check(workers, say=said.append)  # type: ignore[arg-type]
    assert [found.stages[name].state for name in workers.cases] == [FAILED, FAILED, OK]
    assert states(found, "one") == {"a": OK, "bad": FAILED, "c": OK}
    assert states(found, "two") == {"die": CUT_OFF, "b": WAITING}
    assert "no such library" in (found.stages["two"].error or "")
    assert "failed: bad (wrong)" in said[0] and "2 of 3 cases" in said[0]
    assert "not reached: b" in said[1]
    # all of it is in the file
    assert load_check(tmp_path / "found.json") == found


def test_a_second_call_tries_what_is_left_and_the_bad_ones_last(tmp_path: Path) -> None:
    workers = Workers(tmp_path, one="bad b", two="c")
    check(workers)
    found = check(workers)
    assert found.stages["one"].state == found.stages["two"].state == OK
    assert workers.orders("one") == [
        {"done": [], "last": []},
        {"done": ["b"], "last": ["bad"]},
    ]
    assert len(workers.orders("two")) == 1
    assert found.stages["one"].cases["b"]["figures"] == {"at": 1}


def test_a_stage_that_hangs_is_cut_off_with_what_it_had(tmp_path: Path) -> None:
    workers = Workers(tmp_path, one="a slow c", two="d")
    started = time.monotonic()
    found = check(workers, limit_s=3)
    assert time.monotonic() - started < 30
    assert found.stages["one"].state == CUT_OFF
    assert states(found, "one") == {"a": OK, "slow": CUT_OFF, "c": WAITING}
    assert "cut off after 3 s" in (found.stages["one"].error or "")
    assert found.stages["two"].state == OK
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "one.log.pid").read_text()), 0)
    found = check(workers)
    assert states(found, "one") == {"a": OK, "slow": OK, "c": OK}
    # what hung came last
    assert found.stages["one"].cases["slow"]["figures"] == {"at": 1}


def test_the_budget_of_a_call(tmp_path: Path) -> None:
    workers = Workers(tmp_path, one="slow", two="b")
    found = check(workers, budget_s=2)
    assert found.stages["one"].state == CUT_OFF
    assert (found.stages["two"].state, found.stages["two"].cases) == (WAITING, {})
    assert 2 <= found.seconds < 20
    assert check(workers).stages["two"].state == OK


def test_an_interrupted_check_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(tmp_path, one="a slow")
    wait = runner.subprocess.Popen.wait

    def interrupted(process: object, timeout: float | None = None) -> int:
        if timeout == 30:
            with pytest.raises(runner.subprocess.TimeoutExpired):
                wait(process, 2)  # type: ignore[arg-type]
            raise KeyboardInterrupt
        return wait(process, timeout)  # type: ignore[arg-type]

    monkeypatch.setattr(runner.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(workers)
    assert states(load_check(tmp_path / "found.json"), "one") == {"a": OK, "slow": CUT_OFF}


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    workers = Workers(tmp_path, one="a")
    check(workers)
    out = tmp_path / "found.json"
    with pytest.raises(InputError, match="another device, size or GPU"):
        run_check(out, device="cpu", small=True, command=workers)
    for text in ("{}", "no JSON", "[]", '{"kind": "gpu-check", "version": 9}'):
        out.write_text(text)
        with pytest.raises(InputError, match="no result of the GPU check"):
            check(workers)
    assert check(workers, again=True).stages["one"].state == OK


def test_the_stages_fit_into_eight_minutes() -> None:
    assert sum(stage.limit_s for stage in STAGES) <= BUDGET_S == 480
    names = ["doctor", "kernels", "tiny", "unet", "pipeline", "roofline"]
    assert [stage.name for stage in STAGES] == names
    interpreted = {s.name: dict(s.environment) for s in stages_for("cpu") if s.environment}
    assert interpreted == {"kernels": {"TRITON_INTERPRET": "1"}}
