"""The sampler on engines that do nothing: that they do nothing, and how often they are called."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hcma_fast.bench.overhead import NoOpEngine, OverheadReport, measure_overhead
from hcma_fast.cli.app import main
from hcma_fast.cli.bench_limits import overhead_table
from hcma_fast.errors import UsageError
from hcma_fast.models.weights import Components
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


@pytest.fixture(scope="module")
def report() -> OverheadReport:
    return measure_overhead("tiny", batch=2, num_inference_steps=50, rounds=3)


def test_fifty_steps_are_51_evaluations_and_50_alignments(report: OverheadReport) -> None:
    calls = {row.name: row.calls for row in report.rows}
    assert calls["sampler"] == {"align": 50, "unet_grounded": 51, "unet_plain": 0}
    assert calls["fused sampler"] == {"step_grounded": 51, "step_plain": 0}


def test_percentiles_are_in_order(report: OverheadReport) -> None:
    for row in report.rows:
        assert 0 < row.p10_ms <= row.median_ms <= row.p90_ms
    assert (report.preset, report.goal_ms) == ("tiny", 0.3)


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"batch": 513}, {"rounds": 0}, {"num_inference_steps": 1}]
)
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        measure_overhead("tiny", **options)  # type: ignore[arg-type]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "overhead", "--model", "sd14", "--steps", "4", "--rounds", "2"]
    assert main([*command, "--json"]) == 0
    found = OverheadReport.model_validate(json.loads(capsys.readouterr().out))
    assert found.rows[0].calls == {"align": 4, "unet_grounded": 5, "unet_plain": 0}
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "align 4, unet_grounded 5" in shown
    assert found.machine.cpu in shown
    assert overhead_table(found).endswith(f"{found.machine.line()}.")
    assert main(["bench", "overhead", "--model", "no-such-model"]) == 3
