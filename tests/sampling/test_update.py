"""The update by plain operators, which a CPU calls, against the one by the registered op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcma_fast.sampling.loop import Schedule
from hcma_fast.sampling.update import KernelUpdate, OperatorUpdate, Update

from captures import plan, relative

SHAPE = (2, 4, 8, 8)
CPU = torch.device("cpu")


def run(
    update: Update, schedules: list[Schedule], guided: bool, spoil: int | None = None
) -> list[Tensor]:
    """The latents after each evaluation, predictions drawn; from ``spoil`` on image 1 sees NaN."""
    generator = torch.Generator().manual_seed(0)
    update.load(schedules)
    update.z.copy_(torch.randn(SHAPE, generator=generator))
    found = []
    for k in range(max(len(schedule.table) for schedule in schedules)):
        eps = torch.randn(2, *SHAPE, generator=generator)
        if spoil is not None and k >= spoil:
            eps[:, 1] = torch.nan
        update(torch.tensor([k]), eps[0] if guided else None, eps[1])
        found.append(update.z.clone())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["wide", "narrow"])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    "schedules",
    [[plan(steps=20)], [plan(steps=2, guidance=7.5), plan(steps=9)]],
    ids=["one-for-all", "two"],
)
def test_operators_equal_the_op(
    schedules: list[Schedule], guided: bool, dtype: torch.dtype
) -> None:
    expected = run(KernelUpdate(SHAPE, dtype, CPU), schedules, guided)
    update = OperatorUpdate(SHAPE, dtype, CPU)
    assert update.state.dtype == update.z.dtype == dtype
    # what another batch left behind is not looked at
    update.state.fill_(torch.nan)
    for ours, theirs in zip(run(update, schedules, guided), expected, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert relative(ours.float(), theirs.float()) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", [KernelUpdate, OperatorUpdate])
def test_an_image_that_is_done_sees_nothing_of_later_predictions(
    kind: type[KernelUpdate] | type[OperatorUpdate],
) -> None:
    schedules = [plan(steps=9), plan(steps=4)]
    latents = run(kind(SHAPE, torch.float32, CPU), schedules, True, spoil=5)
    assert torch.equal(latents[-1][1], latents[4][1])
    assert bool(latents[-1].isfinite().all())
    assert not torch.equal(latents[-1][0], latents[4][0])
    broken = run(kind(SHAPE, torch.float32, CPU), schedules, True, spoil=4)
    assert broken[-1][1].isnan().all() and bool(broken[-1][0].isfinite().all())
