"""Solver tables against diffusers' schedulers, and what a schedule adds to them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_contract import SOLVERS, align, expected, make_schedule, predict, start

from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import InputError, UsageError
from hcma_fast.kernels.update_sums import columns_of, denoise_update_rows, update_of
from hcma_fast.sampling.savings import Savings
from hcma_fast.sampling.schedule import Schedule, eta_table
from hcma_fast.sampling.solvers import Solver, dpmpp_2m, plms
from hcma_fast.schedule import alphas_cumprod, grounded_steps, in_window
from hcma_fast.specs import HISTORY, PLAN_COLUMNS, PLAN_ROWS, Column

#: a busy machine is no fault of the code
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_the_papers_51_timesteps() -> None:
    table = plms(50)
    assert table.timesteps.tolist() == [981, 961, 961, *range(941, 0, -20)]
    assert table.step_index.tolist() == [0, 0, *range(1, 50)]
    assert len(table) == 51 and int(table.aligns.sum()) == 50
    assert table.aligns.tolist() == [True, False] + [True] * 49
    assert table.columns[:, Column.PUSHES].tolist() == [1, 0] + [1] * 49
    assert (table.columns[:, Column.NEXT_STORED] != 0).tolist() == [False, True] + [False] * 49
    assert table.columns.dtype == torch.float64
    # a multistep rule that is exact for constant noise has weights that sum to 1
    weights = table.columns[:, Column.NEXT_0 : Column.NEXT_3 + 1].sum(1)
    torch.testing.assert_close(weights, torch.ones(51, dtype=torch.float64))


@pytest.mark.parametrize("solver", SOLVERS)
def test_whole_trajectories_equal_diffusers_schedulers_in_float64(solver: str) -> None:
    """Few and many steps, with and without alignment."""
    for steps in {"plms": (2, 3, 4, 20, 33, 999), "ddim": (2, 20), "dpmpp_2m": (2, 3, 15)}[solver]:
        schedule = make_schedule(solver, steps, eta0=0.0 if steps == 20 else 0.1)
        truth = expected(solver, schedule, 0)
        z = start(0).unsqueeze(0)
        stored, history = torch.zeros_like(z), [torch.zeros_like(z)] * HISTORY
        assert len(truth) == len(schedule.table) == steps + (solver == "plms")
        for k, expected_z in enumerate(truth):
            row = schedule.plan[k : k + 1]
            # the factors as tensors, and as numbers
            update = update_of(columns_of(row, 4) if k % 2 else row[0].tolist())
            z = align(z, row[:, Column.ETA])
            halves = (predict(z, row[:, Column.TIMESTEP], half) for half in (0, 1))
            z, stored, history = denoise_update_rows(
                z, stored, history, *halves, None, None, update
            )
            error = float((z[0] - expected_z).norm() / expected_z.norm())
            assert error < 1e-9, f"evaluation {k} of {len(truth)}"


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_wrong_step_counts(solver: Solver) -> None:
    junk = (2.5, math.nan, "50", None, True, np.bool_(True), np.array([20, 20]))
    for steps in (1, 0, -5, 1000, *junk):
        with pytest.raises(UsageError, match="2 to 999") as caught:
            solver(steps)  # type: ignore[arg-type]
        assert caught.value.value is steps and caught.value.exit_code == 2
        assert caught.value.remedy


def test_steps_may_be_numpys() -> None:
    for solver in SOLVERS.values():
        table = solver(20)
        for steps in (np.int64(20), np.uint8(20), np.float64(20), np.array(20), torch.tensor([20])):
            assert solver(steps) is table  # type: ignore[arg-type]


def test_steps_that_would_share_a_timestep_are_refused() -> None:
    with pytest.raises(UsageError, match="same timestep"):
        dpmpp_2m(900)


def test_dpmpp_is_uniform_in_lambda() -> None:
    times = dpmpp_2m(15).timesteps
    assert (int(times[0]), int(times[-1])) == (981, 1)
    abar = alphas_cumprod()[times]
    gaps = (abar / (1 - abar)).log().diff()
    assert float(gaps.max() / gaps.min()) < 1.5, "up to the rounding of the last timesteps"


def test_a_plan_has_a_row_per_evaluation_and_idle_ones_behind() -> None:
    longest = Schedule.of(999, AlignmentSettings())
    assert len(longest.table) == 1000 and longest.plan.shape == (PLAN_ROWS, PLAN_COLUMNS)
    assert longest.plan[:1000, Column.TIMESTEP].tolist() == longest.table.timesteps.tolist()
    assert longest.plan[1000, Column.ACTIVE] == 0
    short = make_schedule("plms", 4).plan
    assert short[:, Column.ACTIVE].sum() == 5 and not short[5:, Column.PUSHES].any()
    with pytest.raises(InputError, match="one alignment rate per evaluation"):
        replace(longest, etas=torch.zeros(999))


def test_a_repeated_gradient_has_the_rate_of_its_own_step() -> None:
    schedule = make_schedule("ddim", 5, savings=Savings(align_every=2))
    computed, repeated = schedule.plan[:5, Column.ETA], schedule.plan[:5, Column.REPEAT]
    assert (computed > 0).tolist() == [True, False] * 2 + [True]
    assert torch.equal(computed + repeated, schedule.etas)


def test_etas_of_the_paper() -> None:
    etas = eta_table(plms(50), AlignmentSettings(eta0=0.7))
    table = plms(50)
    assert etas.dtype == torch.float64 and etas.shape == (51,)
    assert int(etas.count_nonzero()) == 50 and etas[1] == 0
    expected = 0.7 * (1 - alphas_cumprod()[table.timesteps[table.aligns]]).sqrt()
    torch.testing.assert_close(etas[table.aligns], expected, rtol=1e-14, atol=0)
    assert not eta_table(plms(50), AlignmentSettings(eta0=0)).any()


@untimed
@given(
    steps=st.integers(2, 120),
    window=st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted),
)
def test_eta_window_is_half_open(steps: int, window: list[int]) -> None:
    start, end = (share / 10 for share in window)
    etas = eta_table(plms(steps), AlignmentSettings(eta0=1, window=(start, end)))
    aligned = etas[plms(steps).aligns]
    # in whole numbers, so that this test does not round
    inside = [window[0] * steps <= 10 * step < window[1] * steps for step in range(steps)]
    assert (aligned > 0).tolist() == inside
    assert etas[1] == 0


@pytest.mark.parametrize(
    "window", [(0.46, 0.67), (0.0, 1.0), (0.2, 0.9), (0.0, 0.02), (0.98, 1.0), (0.5, 0.5)]
)
def test_training_aligns_at_the_timesteps_at_which_sampling_does(
    window: tuple[float, float],
) -> None:
    settings = AlignmentSettings(eta0=1, window=window)
    table = plms(50)
    times = table.timesteps[table.aligns]
    sampled = eta_table(plms(50), settings)[table.aligns] > 0
    assert torch.equal(in_window(times, settings), sampled)
    # each of the others goes with the step whose 20 timesteps it is among
    everywhere = in_window(torch.arange(1000), settings)
    assert torch.equal(everywhere, sampled.flip(0).repeat_interleave(20))


def test_windows_of_the_two_halves_share_no_step() -> None:
    whole = eta_table(plms(50), AlignmentSettings())
    halves = [eta_table(plms(50), AlignmentSettings(window=w)) for w in ((0.0, 0.3), (0.3, 1.0))]
    assert [int(h.count_nonzero()) for h in halves] == [15, 35]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("share", "steps", "grounded"),
    [
        (0.3, 50, 15),
        # where rounding gives one more
        *((0.35, 50, 17), (0.99, 50, 49), (0.5, 7, 3), (0.19, 10, 1), (0.04, 20, 0)),
        # GLIGEN computes in float64, in which 0.29 * 100 is a little less than 29
        (0.29, 100, 28),
        *((0.0, 50, 0), (1.0, 50, 50)),
    ],
)
def test_shares_of_grounded_steps_are_cut_as_gligen_does(
    share: float, steps: int, grounded: int
) -> None:
    assert grounded_steps(share, steps) == grounded == int(share * steps)
    schedule = Schedule.of(steps, AlignmentSettings(grounding_beta=share))
    # evaluation 1 is the corrector of step 0, and has its gate
    gates = [step < grounded for step in (0, 0, *range(1, steps))]
    assert schedule.gates().tolist() == gates and schedule.grounded_steps == grounded
