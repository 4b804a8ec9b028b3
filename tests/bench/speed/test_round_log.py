"""An interrupted suite keeps its rounds, writes its rows after each, and goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from hcma_fast.bench.shared.machine import lacks_bfloat16
from hcma_fast.bench.speed.harness.plan import Plan
from hcma_fast.bench.speed.harness.round_log import RoundLog, SuiteKey
from hcma_fast.bench.speed.harness.rounds import Case, Group, group_rows, in_words, take_turns
from hcma_fast.bench.speed.harness.workers import Contestant, Loaded, Run
from hcma_fast.bench.speed.suites.peers import peers
from hcma_fast.bench.speed.suites.training import train
from hcma_fast.errors import InputError

KEY = SuiteKey(
    suite="latency",
    model="tiny",
    device="cpu",
    backends=(),
    rounds=3,
    quick=False,
    cpu="a cpu",
    commit="abc",
)
RESULT = np.array([[3.0, 4.0]], np.float32)
LOADED = {name: Loaded("tiny", "0" * 64, 2.5) for name in "ABC"}


def never() -> Contestant:
    raise AssertionError("nothing is loaded")


GROUP = Group(
    "fakes", [Case("A", never), Case("B", never), Case("C", never, warm_up=False, max_error=None)]
)


class Workers(dict[str, object]):
    """Runs that take 1, 2, 3 ... seconds by their own account; the run after ``last`` fails."""

    def __init__(self, log: RoundLog, last: int = 99) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.log, self.last = log, last

    def run(self, name: str) -> Run:
        if len(self.calls) >= self.last:
            raise KeyboardInterrupt
        self.calls.append(name)
        return Run(float(len(self.calls)), RESULT, 7.0, None, {"rate": 2.0})

    def measure(self) -> dict[str, list[Run]]:
        def finish(number: int, turns: Mapping[str, Sequence[Run]], ran: Sequence[str]) -> None:
            self.log.add(GROUP.name, number, {n: turns[n][-1] for n in ran}, LOADED, {})

        runs = {name: (lambda name=name: self.run(name)) for name in "ABC"}
        earlier = self.log.turns(GROUP.name)
        return take_turns(GROUP, GROUP.cases, runs, 3, earlier=earlier, finish=finish)


def test_an_interrupted_group_goes_on_after_its_last_round(tmp_path: Path) -> None:
    path = tmp_path / "latency.rounds.jsonl"
    first = Workers(RoundLog(path, KEY, resume=False), last=7)
    with pytest.raises(KeyboardInterrupt):
        first.measure()
    # the warm-up has no C; round 1 is whole, round 2 is not
    assert first.calls == list("AB") + list("CBA") + list("AB")
    with path.open("a") as file:
        file.write('{"group": "half a li')
    log = RoundLog(path, KEY, resume=True)
    assert log.finished("fakes") == 1 and log.finished("another") == 0
    assert [run.seconds for run in log.turns("fakes")["A"]] == [1.0, 5.0]
    second = Workers(log)
    turns = second.measure()
    # new processes warm up, which is not counted; then rounds 2 and 3
    assert second.calls == list("AB") + list("ABC") + list("CBA")
    assert [run.seconds for run in turns["A"]] == [1.0, 5.0, 3.0, 8.0]
    assert [run.seconds for run in turns["C"]] == [3.0, 5.0, 6.0]
    rows = group_rows(GROUP, turns, log.loaded("fakes"))
    assert [len(row.seconds) for row in rows] == [3, 3, 3] and not any(row.void for row in rows)
    assert rows[1].relative_error == 0 and rows[0].figures == {"rate": 2.0}
    assert rows[0].load_s == 2.5
    # a third time, nothing is left to run
    again = RoundLog(path, KEY, resume=True)
    assert again.finished("fakes") == 3
    assert group_rows(GROUP, again.turns("fakes"), again.loaded("fakes")) == rows
    again.close()
    assert not path.exists()


def test_rounds_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latency.rounds.jsonl"
    Workers(RoundLog(path, KEY, resume=False)).measure()
    for name, value in (("commit", "def"), ("cpu", "another"), ("rounds", 5), ("quick", True)):
        with pytest.raises(InputError, match=f"of another {name}"):
            RoundLog(path, KEY.model_copy(update={name: value}), resume=True)
    path.write_text("junk\n")
    with pytest.raises(InputError, match="cannot be read"):
        RoundLog(path, KEY, resume=True)
    # without resume the file begins anew
    assert RoundLog(path, KEY, resume=False).finished("fakes") == 0
    assert RoundLog(path, KEY, resume=True).finished("fakes") == 0


def test_a_case_that_failed_stays_out(tmp_path: Path) -> None:
    path = tmp_path / "latency.rounds.jsonl"
    log = RoundLog(path, KEY, resume=False)
    run = Run(1.0, RESULT)
    log.add("fakes", 0, {"A": run, "B": run}, LOADED, {})
    log.add("fakes", 1, {"A": run}, LOADED, {"B": "out of memory"})
    log = RoundLog(path, KEY, resume=True)
    assert list(log.turns("fakes")) == ["A"] and log.failed("fakes") == {"B": "out of memory"}


def test_durations_for_a_reader() -> None:
    assert [in_words(s) for s in (4.2, 89, 600, 9000)] == ["4 s", "89 s", "10 min", "2.5 h"]


def test_bfloat16_is_left_out_where_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, missing in (
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ({"avx512_bf16": True}, False),
        ({"amx_bf16": True}, False),
        ({"neon": True, "bf16": True}, False),
    ):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda found=capabilities: found)
        why = lacks_bfloat16()
        assert (why is not None) is missing
        plan = Plan(quick=True, backends=("eager",))
        for suite, name in (
            (peers, "plain loop in bfloat16"),
            (train, "bfloat16 autocast, cached"),
        ):
            group = suite(plan)[0]
            assert (name in [case.name for case in group.cases]) is not missing
            assert dict(group.left_out) == ({name: why} if missing else {})
