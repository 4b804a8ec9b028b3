"""What a saving gains and costs, on a small random model and with a judge that is the real one."""

from __future__ import annotations

import pytest

from hcma_fast import HCMAPipeline
from hcma_fast.bench.quality.metrics.judge.model import Judge
from hcma_fast.bench.speed.savings import measure_savings
from hcma_fast.cli.bench.savings import savings_table
from hcma_fast.errors import UsageError
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.sampling.savings import Savings


@pytest.fixture(scope="module")
def pipe() -> HCMAPipeline:
    return HCMAPipeline.from_components(load_components("tiny"))


def test_rows_are_compared_with_no_savings(pipe: HCMAPipeline) -> None:
    done: list[int] = []
    report = measure_savings(
        pipe,
        [Savings(skip_idle_alignment=False), Savings(guidance_end=0.5)],
        count=3,
        batch_size=2,
        num_inference_steps=4,
        judge=Judge.load(),
        progress=lambda n, of: done.append(n),
    )
    assert done == [2, 3]
    none, exact, approximate = report.rows
    assert none.distance == 0 and none.speedup == 1 and none.difference is None
    assert exact.distance == 0
    assert approximate.distance > 1e-3
    assert exact.difference is not None and exact.difference.difference == 0
    assert none.judge is not None and exact.judge is not None
    assert none.judge.value == exact.judge.value
    table = savings_table(report)
    assert "`guidance_end=0.5`" in table and "| none |" in table


def test_without_a_judge_there_is_no_score(pipe: HCMAPipeline) -> None:
    report = measure_savings(
        pipe, [Savings(align_every=2)], count=1, batch_size=1, num_inference_steps=2
    )
    assert all(row.judge is None and row.difference is None for row in report.rows)
    assert "not judged" in savings_table(report)


@pytest.mark.parametrize("numbers", [{"count": 0}, {"batch_size": 0}, {"savings": []}])
def test_bad_numbers_are_refused(pipe: HCMAPipeline, numbers: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        measure_savings(pipe, **numbers)
