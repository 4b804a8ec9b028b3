"""The sampler on engines that do nothing: that they do nothing, and how often they are called."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hcma_fast.bench.speed.harness.plan import Plan
from hcma_fast.bench.speed.suites import overhead as module
from hcma_fast.bench.speed.suites.overhead import NoOpEngine, load_sampler, overhead
from hcma_fast.cli.app import main
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import BATCH


class Operators(TorchDispatchMode):
    """Notes every operator that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_engines_do_no_work(random_components: Components) -> None:
    for name, spec in random_components.specs().items():
        engine = NoOpEngine(spec, 2)
        with Operators() as operators:
            first, second = engine({}), engine({})
        assert operators.seen == [], name
        assert engine.calls == 2
        # made once, of the shapes that the graph would give
        assert [t.data_ptr() for t in first.values()] == [t.data_ptr() for t in second.values()]
        for tensor in spec.outputs:
            sizes = tuple(2 if size == BATCH else size for size in tensor.shape)
            assert tuple(first[tensor.name].shape) == sizes
            assert first[tensor.name].dtype == getattr(torch, tensor.dtype)


CALLS = {
    "sampler": {"align": 50, "unet_grounded": 51},
    "sampler with step graphs": {"step_grounded": 51},
    "captured sampler": {"align": 50, "unet_grounded": 51},
    "captured sampler with step graphs": {"step_grounded": 51},
}


def test_every_sampler_is_a_case_of_the_suite() -> None:
    (group,) = overhead(Plan("tiny"))
    assert [case.name for case in group.cases] == list(CALLS)
    assert all(case.labels["steps"] == 50 and case.max_error is None for case in group.cases)


@pytest.mark.parametrize("name", CALLS)
def test_fifty_steps_are_51_evaluations_and_50_alignments(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[NoOpEngine] = []

    class Counted(NoOpEngine):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(module, "NoOpEngine", Counted)
    contestant = load_sampler("tiny", name, 50, 2)
    contestant.generate()
    before = {engine.spec.graph: engine.calls for engine in made}
    z = contestant.generate()
    calls = {engine.spec.graph: engine.calls - before[engine.spec.graph] for engine in made}
    assert {graph: n for graph, n in calls.items() if n} == {
        graph: 2 * n for graph, n in CALLS[name].items()
    }
    assert z.shape == (1, 4, 16, 16)
    figures = contestant.figures()
    assert 0 < figures["ms_per_step"] < 100


def test_a_sampler_is_timed_at_full_size_without_weights() -> None:
    contestant = load_sampler("sd14", "captured sampler with step graphs", 4, 1)
    assert contestant.generate().shape == (1, 4, 64, 64)
    assert contestant.figures()["ms_per_step"] > 0


def test_a_missing_model_is_bad_input() -> None:
    assert main(["bench", "run", "overhead", "--model", "no-such-model"]) == 3


@pytest.mark.slow
def test_the_suite_runs_at_full_size_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "run", "overhead", "--model", "sd14", "--quick", "--json"]
    assert main(command) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert [row["name"] for row in report["rows"]] == list(CALLS)
    assert all(row["figures"]["ms_per_step"] > 0 and not row["void"] for row in report["rows"])
