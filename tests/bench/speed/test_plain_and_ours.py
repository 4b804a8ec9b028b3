"""The speed harness: a process for each contestant, what goes wrong in it, and the command."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hcma_fast.bench.shared.clocks import Clocks
from hcma_fast.bench.shared.memory import own_peak_rss_mib, peak_rss_mib
from hcma_fast.bench.speed.harness.contestants import LAYOUT, Ours, Work, load_ours, load_plain
from hcma_fast.bench.speed.harness.report import report_markdown
from hcma_fast.bench.speed.harness.rounds import Case, Group, run_group
from hcma_fast.bench.speed.plain_and_ours import PLAIN, generate_command, measure_speed
from hcma_fast.cli.app import main
from hcma_fast.cli.bench.command import bench_app
from hcma_fast.errors import BackendError, HcmaError, UsageError
from hcma_fast.export.cache import cached_folder
from hcma_fast.export.manifest import load_manifest
from hcma_fast.export.target import Target
from hcma_fast.layout import Layout

#: contestants without a model, that workers can import; the backend says how they behave
FAKES = """
import os, signal, sys, time
import numpy as np
from hcma_fast.bench.speed.harness.contestants import Ours
from hcma_fast.bench.speed.harness.workers import Contestant
from hcma_fast.errors import BackendError

def load_plain(model, work, device="cpu"):
    return load_ours(model, Ours("plain"), work)

def load_ours(model, ours, work, device="cpu"):
    backend, batch = ours.backend, work.batch

    def note(event):
        with open(os.environ["FAKES_LOG"], "a") as log:
            log.write(f"{event} {backend} {os.getpid()}\\n")

    def generate():
        note("start")
        time.sleep(600 if backend == "endless" else 0.02)
        if backend == "failing":
            raise BackendError("lost the device", value=backend, remedy="Plug it in.")
        if backend == "full":
            raise MemoryError
        if backend == "faulty":
            return 1 // 0
        if backend == "dying":
            print("x" * 100_000, "these are my last words", file=sys.stderr)
            os._exit(7)
        if backend == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if backend == "loud":
            print("x" * 1_000_000)
            print("x" * 1_000_000, file=sys.stderr)
        note("end")
        return np.full((batch, 4, 2, 2), 1.01 if backend == "wrong" else 1, np.float32)

    note("load")
    assert "torch" not in sys.modules, "who needs no torch must not wait for it"
    if backend == "refused":
        raise BackendError("not on this machine", value=backend, remedy="Take another.")
    return Contestant(generate, "fake", "0" * 64)
"""


class Fakes:
    """What the contestants of :data:`FAKES` wrote down."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def events(self) -> list[tuple[str, str, int]]:
        """(event, contestant, process id), in the order in which they happened."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(event, name, int(pid)) for event, name, pid in map(str.split, lines)]

    def steps(self) -> list[tuple[str, str]]:
        return [(event, name) for event, name, _ in self.events()]

    def alive(self) -> set[int]:
        """Those of their processes that still run."""
        return {pid for *_, pid in self.events() if runs(pid)}


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        # a zombie whose new parent does not care for it has ended too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """``measure_speed`` and the command time fakes: no model, and no import of diffusers."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    (folder / "fake_contestants.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("FAKES_LOG", str(tmp_path / "log"))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "fake_contestants", raising=False)
    module = importlib.import_module("fake_contestants")
    for name in ("load_plain", "load_ours"):
        monkeypatch.setattr(f"hcma_fast.bench.speed.plain_and_ours.{name}", getattr(module, name))
    return Fakes(tmp_path / "log")


def test_each_contestant_has_a_process_and_only_one_runs_at_a_time(fakes: Fakes) -> None:
    # a loud one would fill a pipe, and wait for ever
    report = measure_speed("-", backends=["loud", "c"], rounds=2, batch=2, memory=False)
    events = fakes.events()
    pids = {name: pid for _, name, pid in events}
    assert len({*pids.values(), os.getpid()}) == 4
    assert fakes.steps()[:3] == [("load", "plain"), ("load", "loud"), ("load", "c")]
    order = ["plain", "loud", "c", "c", "loud", "plain", "plain", "loud", "c"]
    assert events[3:] == [(event, name, pids[name]) for name in order for event in ("start", "end")]
    assert fakes.alive() == set()
    for row in report.rows:
        assert (row.preset, row.weights_hash) == ("fake", "0" * 64)
        assert row.relative_error == 0 and row.images == 2
        # what the contestant measured, a sleep of 0.02 s, and its own memory
        assert len(row.seconds) == 2 and min(row.seconds) >= 0.02
        assert 5 < row.peak_rss_mib < own_peak_rss_mib()
        assert row.clocks.load_average is not None
    # each row has its own: the machine's would be those of an idle one
    assert report.machine.clocks == Clocks()


@pytest.mark.parametrize(
    ("backend", "kind", "words"),
    [
        ("refused", BackendError, "not on this machine (got 'refused'). Take another."),
        ("failing", BackendError, "lost the device (got 'failing'). Plug it in."),
        ("full", MemoryError, ""),
        ("faulty", HcmaError, "ZeroDivisionError"),
        ("dying", HcmaError, "x these are my last words (got 7)"),
        ("killed", HcmaError, "hcma-fast killed died: it said nothing (got -9)"),
    ],
)
def test_what_goes_wrong_in_a_process_is_raised_here_and_ends_all(
    fakes: Fakes, backend: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as caught:
        measure_speed("-", backends=[backend], memory=False)
    assert type(caught.value) is kind
    assert words in str(caught.value) and len(str(caught.value)) < 600
    if kind is not HcmaError:
        assert "fake_contestants.py" in caught.value.__notes__[0]
    assert len({pid for *_, pid in fakes.events()}) == 2
    assert fakes.alive() == set()


def test_the_command_ends_with_the_code_of_a_contestants_error(
    fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "speed", "--backend", "refused", "--no-memory"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("error: not on this machine (got 'refused'). Take another.\n")
    assert fakes.alive() == set()


#: as in tests/cli/conftest.py: a background shell would have SIGINT ignored
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import fake_contestants
from hcma_fast.bench.speed import plain_and_ours as speed
from hcma_fast.cli.app import main
speed.load_plain, speed.load_ours = fake_contestants.load_plain, fake_contestants.load_ours
sys.exit(main(["bench", "speed", "--backend", "endless", "--no-memory"]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after_an_interrupt_or_a_kill(fakes: Fakes, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        start_new_session=True,
    )
    try:
        while process.poll() is None and ("start", "endless") not in fakes.steps():
            time.sleep(0.02)
        assert len(fakes.alive()) == 2
        # a terminal sends it to the whole group
        os.killpg(process.pid, how)
        _, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), stderr
    assert "Traceback" not in stderr
    if how == signal.SIGKILL:  # they notice by themselves, a moment later
        deadline = time.monotonic() + 60
        while fakes.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert fakes.alive() == set()


def test_what_cannot_run_is_told_and_the_others_go_on(fakes: Fakes) -> None:
    module = importlib.import_module("fake_contestants")
    names = ("plain", "refused", "failing", "b")
    cases = [Case(n, partial(module.load_ours, "-", Ours(n), Work())) for n in names]
    failed: dict[str, str] = {}
    rows = run_group(Group("g", cases), 1, failed=failed)
    assert [row.name for row in rows] == ["plain", "b"]
    assert set(failed) == {"g: refused", "g: failing"} and "Plug it in" in failed["g: failing"]
    assert fakes.alive() == set()
    # without its yardstick nothing is known of what is compared with it, which is told
    failed.clear()
    assert run_group(Group("g", [cases[1], cases[3]]), 1, failed=failed) == ()
    assert set(failed) == {"g: refused", "g: b"} and "refused, which it is" in failed["g: b"]


@pytest.mark.parametrize("fails", ["refused", "failing"])
def test_what_is_not_compared_needs_no_yardstick(fakes: Fakes, fails: str) -> None:
    module = importlib.import_module("fake_contestants")
    cases = [
        Case(n, partial(module.load_ours, "-", Ours(n), Work()), max_error=most)
        for n, most in ((fails, None), ("b", None), ("c", 1e-3), ("d", None))
    ]
    failed: dict[str, str] = {}
    rows = run_group(Group("g", cases), 2, failed=failed)
    assert [row.name for row in rows] == ["b", "d"]
    assert set(failed) == {f"g: {fails}", "g: c"}
    for row in rows:
        assert len(row.seconds) == 2 and not row.void and row.speedup is None


def test_a_missing_engine_is_built_in_a_process_of_its_own_before_any_loads(
    fakes: Fakes, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    built: list[Any] = []

    @contextmanager
    def process(name: str, load: Any) -> Iterator[None]:
        built.append((name, load.args, fakes.events()))
        yield

    monkeypatch.setattr("hcma_fast.bench.speed.harness.contestants.worker", process)
    measure_speed(
        random_checkpoint, backends=["onnxruntime"], rounds=1, memory=False, progress=said.append
    )
    what = (str(random_checkpoint), Target("onnxruntime"))
    assert built == [("the build for onnxruntime", what, [])]
    assert said[:2] == ["build onnxruntime", f"load {PLAIN}"]


@pytest.mark.parametrize("work", [Work(3, 2), Work(4, 2, 5, evaluations=1), Work(4, eta0=0.0)])
def test_real_contestants_agree(random_checkpoint: Path, work: Work) -> None:
    plain = load_plain(random_checkpoint, work)
    ours = load_ours(random_checkpoint, Ours("eager"), work)
    assert plain.preset == ours.preset == "random"
    assert plain.weights_hash == ours.weights_hash
    expected, found = plain.generate(), ours.generate()
    assert expected.shape == (work.batch, 4, 8, 8) and expected.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < 1e-5
    if work.batch > 1:
        assert not np.allclose(expected[0], expected[1])


def test_a_pipeline_of_mixed_engines_agrees(
    random_checkpoint: Path, random_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_engines(random_engine, tmp_path, monkeypatch)
    mixed = Ours("onnxruntime", graphs=("unet_grounded", "unet_plain"), grad_backend="onnx")
    found = load_ours(random_checkpoint, mixed, Work(3)).generate()
    expected = load_plain(random_checkpoint, Work(3)).generate()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4


def cached_engines(engine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine folder where the user's cache has it."""
    monkeypatch.setenv("HCMA_FAST_CACHE", str(cache))
    built = cached_folder(load_manifest(engine).weights_hash, Target("onnxruntime"))
    shutil.copytree(engine, built)


def test_peak_memory_is_the_childs_own() -> None:
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    small = peak_rss_mib([sys.executable, "-S", "-c", "pass"])
    large = peak_rss_mib(
        [sys.executable, "-S", "-c", "b = bytearray(200 * 2**20); b[::4096] = b[::4096]"]
    )
    # torch is loaded in this process: a child that inherited its peak would show it
    assert ours > 150 and small < 60
    assert large == pytest.approx(small + 200, abs=30)


def test_peak_memory_of_a_failing_command_is_an_error_with_its_words() -> None:
    with pytest.raises(HcmaError, match="no such thing"):
        peak_rss_mib([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_the_measured_command_draws_the_scene_that_was_timed(tmp_path: Path) -> None:
    command = generate_command("tiny", "onnxruntime", 7, str(tmp_path))
    boxes = [command[i + 1] for i, part in enumerate(command) if part == "--box"]
    parsed = [Layout.parse_box(text) for text in boxes]
    assert Layout([p for p, _ in parsed], [b for _, b in parsed]) == LAYOUT
    assert command[command.index("--steps") + 1] == "7"


def test_the_measured_command_runs(random_checkpoint: Path, tmp_path: Path) -> None:
    command = generate_command(random_checkpoint, "eager", 2, str(tmp_path))
    assert main(command[command.index("generate") :]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize("changes", [{"batch": 0}, {"rounds": 0}, {"num_inference_steps": 1}])
def test_bad_numbers_are_refused(random_checkpoint: Path, changes: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        measure_speed(random_checkpoint, backends=["eager"], memory=False, **changes)


def test_report_and_table(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(command: list[str]) -> float:
        assert fakes.alive() == set()
        return 100.0 + command.count("b")

    monkeypatch.setattr("hcma_fast.bench.speed.plain_and_ours.peak_rss_mib", peak)
    report = measure_speed("-", backends=["a", "b"], num_inference_steps=3, rounds=1)
    assert [row.name for row in report.rows] == [PLAIN, "hcma-fast a", "hcma-fast b"]
    found = [row.figures.get("generate_peak_mib") for row in report.rows]
    assert found == [None, 100, 101]
    table = report_markdown(report)
    assert f"| {PLAIN} | {report.rows[0].median_s:.3g} |" in table
    assert "batch 1, steps 3, boxes 2" in table and "| 101 |" in table
    assert "0" * 16 in table and report.machine.cpu in table


def test_command_prints_json_on_stdout_alone(fakes: Fakes) -> None:
    arguments = ["--backend", "loud", "--rounds", "2", "--json", "--no-memory"]
    result = CliRunner().invoke(bench_app, ["speed", *arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["name"] for row in report["rows"]] == [PLAIN, "hcma-fast loud"]
    for row in report["rows"]:
        assert len(row["seconds"]) == 2 and not row["void"] and row["speedup"] > 0
        assert row["preset"] == "fake" and row["figures"] == {} and row["load_s"] > 0
    assert "warm-up" in result.stderr and "x" * 100 not in result.stderr


@pytest.mark.slow
def test_command_times_real_contestants(
    random_checkpoint: Path,
    random_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cached_engines(random_engine, tmp_path, monkeypatch)
    arguments = ["--model", str(random_checkpoint), "--steps", "4", "--rounds", "2", "--json"]
    result = CliRunner().invoke(bench_app, ["speed", *arguments, "--no-memory"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = [row["name"] for row in report["rows"]]
    assert names == [PLAIN, "hcma-fast eager", "hcma-fast onnxruntime"]
    for row in report["rows"]:
        assert len(row["seconds"]) == 2 and not row["void"] and row["speedup"] > 0
        assert row["preset"] == "random" and row["figures"] == {} and row["load_s"] > 0.1
    assert "warm-up" in result.stderr
    assert "build" not in result.stderr


def test_command_fails_when_the_latents_do_not_agree(fakes: Fakes) -> None:
    arguments = ["--backend", "wrong", "--no-memory", "--rounds", "1"]
    result = CliRunner().invoke(bench_app, ["speed", *arguments])
    assert isinstance(result.exception, HcmaError) and "void" in str(result.exception)
    assert "| hcma-fast wrong |" in result.stdout and "| void | void | 1.0e-02 |" in result.stdout
