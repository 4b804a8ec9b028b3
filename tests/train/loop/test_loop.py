"""The training loop: a killed and resumed run gives bitwise the weights of one that was not."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hcma_fast.errors import OutputError, WeightsError
from hcma_fast.train.loop.loop import DivergenceError, LoopConfig, learning_rate, run

CONFIG = LoopConfig(
    steps=13,
    lr=0.05,
    warmup=3,
    weight_decay=0.01,
    ema_decay=0.9,
    log_every=4,
    checkpoint_every=5,
)
#: the same training as a program of its own; it kills itself at a step, as the kernel would, or
#: while it writes its second state
PROGRAM = """
import importlib.util, os, signal, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("this_test", sys.argv[1])
this_test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(this_test)
model = this_test.make()
plain, written = os.fsync, []

def loss(step):
    if sys.argv[3] == str(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return this_test.squared_error(model)(step)

def fsync(descriptor):
    written.append(descriptor)
    if sys.argv[3] == "writing" and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(descriptor)

os.fsync = fsync

this_test.run(model, loss, this_test.CONFIG, Path(sys.argv[2]))
"""


def make() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def squared_error(model: nn.Module) -> Callable[[int], dict[str, Tensor]]:
    def loss(step: int) -> dict[str, Tensor]:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        error = (model(inputs) - inputs[:, :3].flip(1)).square().mean()
        return {"loss": error, "twice": 2 * error}

    return loss


def weights(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(weights(first), weights(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """Model and average of a run that nothing stopped."""
    model = make()
    return model, run(model, squared_error(model), CONFIG, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stops", [[7], [5], [2], [12], [6, 6, 11]])
def test_stopped_and_resumed_is_bitwise_the_same(
    tmp_path: Path, uninterrupted: tuple[nn.Module, nn.Module], stops: list[int]
) -> None:
    for stop in stops:
        model = make()

        def loss(step: int, model: nn.Module = model, stop: int = stop) -> dict[str, Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            return squared_error(model)(step)

        with pytest.raises(KeyboardInterrupt):
            run(model, loss, CONFIG, tmp_path)
    model = make()
    first: list[int] = []

    def counted(step: int) -> dict[str, Tensor]:
        first.append(step)
        return squared_error(model)(step)

    average = run(model, counted, CONFIG, tmp_path)
    assert first[0] == stops[-1] // 5 * 5 and first[-1] == 12
    assert same(model, uninterrupted[0]) and same(average, uninterrupted[1])


@pytest.mark.parametrize("stop", ["9", "writing"])
def test_kill_and_resume(
    tmp_path: Path, uninterrupted: tuple[nn.Module, nn.Module], stop: str
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", PROGRAM, __file__, str(tmp_path), stop]
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # of a state that was being written there is a file of another name, which is never read
    names = {path.name for path in tmp_path.iterdir()} - {"log.jsonl", "state.pt"}
    assert [name.startswith(".state.pt.") for name in names] == [True] * (stop == "writing")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 5
    # in this process, with the threads that the other one had
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = make()
    average = run(model, squared_error(model), CONFIG, tmp_path)
    torch.set_num_threads(threads)
    assert same(model, uninterrupted[0]) and same(average, uninterrupted[1])


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    model = make()
    average = run(model, squared_error(model), CONFIG, tmp_path)

    def never(step: int) -> dict[str, Tensor]:
        raise AssertionError("no step is left")

    again = make()
    assert same(run(again, never, CONFIG, tmp_path), average) and same(again, model)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"draws": {"batch": 9}}, "batch = 8, not 9"),
        ({"draws": {}}, "batch = 8, not None"),
        ({"lr": 0.1}, "lr = 0.05, not 0.1"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changed: dict[str, object], named: str) -> None:
    config = CONFIG.model_copy(update={"draws": {"batch": 8}})
    model = make()
    run(model, squared_error(model), config, tmp_path)
    stored = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(WeightsError, match=f"begun with {named}") as caught:
        run(model, squared_error(model), config.model_copy(update=changed), tmp_path)
    assert "another --out" in caught.value.remedy
    assert (tmp_path / "state.pt").read_bytes() == stored
    # how often it logs and keeps changes no weight, and a run may be made longer
    often = config.model_copy(update={"log_every": 1, "checkpoint_every": 1, "steps": 14})
    said: list[dict[str, float]] = []
    run(model, squared_error(model), often, tmp_path, on_log=said.append)
    assert said[0] == {"step": 13, "steps": 14} and [record["step"] for record in said] == [13, 14]


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "shape", "keys", "code", "settings"])
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    model = make()
    run(model, squared_error(model), CONFIG, tmp_path)
    state = tmp_path / "state.pt"
    content = state.read_bytes()
    if damage == "keys":
        kept = torch.load(state, weights_only=True)
        torch.save({k: v for k, v in kept.items() if k != "step"}, state)
    elif damage == "code":
        torch.save({"step": 1, "model": print, "optimizer": {}, "ema": {}}, state)
    elif damage == "settings":
        kept = torch.load(state, weights_only=True)
        torch.save({k: v for k, v in kept.items() if k != "settings"}, state)
    elif damage != "shape":
        broken = {"cut": content[: len(content) // 2], "empty": b"", "noise": b"\x00\xff" * 500}
        state.write_bytes(broken[damage])
    other = nn.Linear(5, 3) if damage == "shape" else make()
    stored = state.read_bytes()
    with pytest.raises(WeightsError, match="cannot be resumed") as caught:
        run(other, squared_error(other), CONFIG, tmp_path)
    assert caught.value.value == str(state) and "Delete it" in caught.value.remedy
    assert state.read_bytes() == stored and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ["nan", "inf", "gradient"])
def test_divergence_stops_and_keeps_the_last_good_state(tmp_path: Path, bad: str) -> None:
    model = make()

    def loss(step: int) -> dict[str, Tensor]:
        losses = squared_error(model)(step)
        if step == 7:
            # the root's slope at 0 is infinite, though its value is 0
            root = (0 * model.weight).sum().sqrt()
            losses["loss"] = root if bad == "gradient" else losses["loss"] * float(bad)
        return losses

    def batch(step: int) -> dict[str, Tensor]:
        return {"inputs": torch.full((2, 3), float(step)).T, "plain": torch.tensor(True)}

    with pytest.raises(DivergenceError, match="step 7 is not finite") as caught:
        run(model, loss, CONFIG, tmp_path, batch_of_step=batch)
    assert str(tmp_path) in caught.value.remedy and not math.isfinite(
        float(str(caught.value.value))
    )
    assert all(value.isfinite().all() for value in weights(model))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["model"].values())
    # what the step was computed from can be looked at
    path = tmp_path / "bad-batch-7.safetensors"
    saved = load_file(path)
    assert str(path) in str(caught.value) and saved.keys() == {"inputs", "plain"}
    assert torch.equal(saved["inputs"], torch.full((3, 2), 7.0))


def test_divergence_is_named_where_nothing_can_be_drawn_again(tmp_path: Path) -> None:
    model = make()

    def loss(step: int) -> dict[str, Tensor]:
        return {"loss": model.weight.sum() * float("nan")}

    with pytest.raises(DivergenceError, match="step 0 is not finite") as caught:
        run(model, loss, CONFIG, tmp_path)
    assert "its batch" not in str(caught.value) and not list(tmp_path.glob("bad-batch*"))


@pytest.mark.parametrize("what", ["log", "state", "batch"])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = make()
    if what == "log":
        # the device on which there never is room
        (tmp_path / "log.jsonl").symlink_to("/dev/full")
    else:
        monkeypatch.setattr("os.fsync", full)
    factor = float("nan") if what == "batch" else 1.0

    def loss(step: int) -> dict[str, Tensor]:
        return {"loss": factor * squared_error(model)(step)["loss"]}

    with pytest.raises(OutputError, match="No space left") as caught:
        run(model, loss, CONFIG, tmp_path, batch_of_step=lambda _: dict(model.named_parameters()))
    name = {"log": "log.jsonl", "state": "state.pt", "batch": "bad-batch-0.safetensors"}[what]
    assert caught.value.value == str(tmp_path / name) and caught.value.exit_code == 3
    assert {path.name for path in tmp_path.iterdir()} <= {"log.jsonl"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    model = make()
    with pytest.raises(OutputError, match="Not a directory") as caught:
        run(model, squared_error(model), CONFIG, tmp_path / "file" / "run")
    assert caught.value.value == str(tmp_path / "file" / "run")


def test_learning_rate() -> None:
    config = LoopConfig(steps=1000, lr=2.0, warmup=100)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == pytest.approx(2.0)
    assert max(rates) == pytest.approx(2.0)
    assert all(a < b for a, b in pairwise(rates[:100]))
    assert all(a >= b for a, b in pairwise(rates[100:]))
    assert rates[550] == pytest.approx(2 * 0.51)
    assert rates[-1] == pytest.approx(0.04, rel=1e-3)
    # no step beyond the end goes up again; a run that is all warm-up does not divide by 0
    assert learning_rate(config, 1500) == pytest.approx(0.04)
    assert learning_rate(LoopConfig(steps=5, lr=1.0, warmup=5), 5) == pytest.approx(1.0)


def test_log_holds_means_since_the_last_record(tmp_path: Path) -> None:
    stop = [6]

    def loss(step: int) -> dict[str, Tensor]:
        if step in stop:
            raise KeyboardInterrupt
        return {"loss": model.weight.sum() * 0, "step_number": torch.tensor(float(step))}

    model = make()
    # stopped between a checkpoint and a record: the steps before that count in no mean twice
    with pytest.raises(KeyboardInterrupt):
        run(model, loss, CONFIG, tmp_path)
    stop.clear()
    run(model, loss, CONFIG, tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    means = [(record["step"], record["step_number"]) for record in records]
    assert means == [(4, 1.5), (8, 6.0), (12, 9.5), (13, 12.0)]
    assert {"lr", "steps_per_second", "loss"} <= set(records[0])


def test_average_follows_the_model(tmp_path: Path) -> None:
    model = make()
    start = weights(model)
    checkpoints: list[tuple[int, bool]] = []

    def keep(step: int, averaged: nn.Module) -> None:
        checkpoints.append((step, same(averaged, model)))
        averaged.eval()

    average = run(model, squared_error(model), CONFIG, tmp_path / "slow", keep)
    assert checkpoints == [(5, False), (10, False), (13, False)] and model.training
    for first, now, mean in zip(start, weights(model), weights(average), strict=True):
        assert (mean - now).norm() < (first - now).norm()
    none = CONFIG.model_copy(update={"ema_decay": 0.0})
    model = make()
    assert same(run(model, squared_error(model), none, tmp_path / "none"), model)
