"""The PLMS table, checked against diffusers' PNDMScheduler and DDPMScheduler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import UsageError
from hcma_fast.sampling.loop import Schedule
from hcma_fast.schedule import (
    add_noise,
    alphas_cumprod,
    eta_table,
    grounded_steps,
    in_window,
    plms_table,
)

#: a busy machine is no fault of the code
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pndm(steps: int) -> PNDMScheduler:
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    return scheduler


def test_alphas_are_stable_diffusions() -> None:
    alphas = alphas_cumprod()
    assert alphas.dtype == torch.float64 and alphas.shape == (1000,)
    assert (alphas.diff() < 0).all() and 0 < alphas[-1] < alphas[0] < 1
    torch.testing.assert_close(alphas.float(), pndm(2).alphas_cumprod, rtol=1e-4, atol=0)
    # the closed form of the first value, in which no product rounds
    assert float(alphas[0]) == pytest.approx(1 - 0.00085, abs=1e-15)


def test_the_papers_51_timesteps() -> None:
    table = plms_table(50)
    assert table.timesteps.tolist() == [981, 961, 961, *range(941, 0, -20)]
    assert table.step_index.tolist() == [0, 0, *range(1, 50)]
    assert len(table) == 51 and int(table.aligns.sum()) == 50
    for name in ("aligns", "pushes_history"):
        assert getattr(table, name).tolist() == [True, False] + [True] * 49
    assert table.uses_stored_sample.tolist() == [False, True] + [False] * 49
    assert table.history_weights.dtype == table.noise_scale.dtype == torch.float64
    # a multistep rule that is exact for constant noise has weights that sum to 1
    torch.testing.assert_close(table.history_weights.sum(1), torch.ones(51, dtype=torch.float64))


def noise_network() -> nn.Module:
    """A random network in place of the UNet; it depends on the time and is not linear."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(5, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
    return nn.Sequential(first, nn.Tanh(), last).requires_grad_(False)


def predict(network: nn.Module, z: Tensor, timestep: int) -> Tensor:
    time = torch.full_like(z[:, :1], timestep / 500 - 1)
    return z + network(torch.cat([z, time], dim=1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", [50, 2, 3, 4, 10, 20, 33, 100, 999])
def test_whole_trajectory_equals_pndm_scheduler(steps: int) -> None:
    network, scheduler, table = noise_network(), pndm(steps), plms_table(steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    ours = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    stored, history = ours, list[Tensor]()
    for k, timestep in enumerate(scheduler.timesteps.tolist()):
        noise = predict(network, theirs, timestep)
        theirs = scheduler.step(noise, timestep, theirs).prev_sample

        if not table.uses_stored_sample[k]:
            stored = ours
        predicted = [predict(network, ours, timestep), *history]
        weights = table.history_weights[k].tolist()
        direction = sum((w * eps for w, eps in zip(weights, predicted, strict=False)), 0 * ours)
        ours = float(table.sample_scale[k]) * stored + float(table.noise_scale[k]) * direction
        if table.pushes_history[k]:
            history = predicted[:3]

        error = float((ours - theirs).norm() / theirs.norm())
        assert error < 1e-5, f"evaluation {k} of {len(table)}"
    assert theirs.isfinite().all() and len(table) == steps + 1


@pytest.mark.parametrize(
    "steps", [1, 0, -5, 1000, 2.5, math.nan, "50", None, True, np.bool_(True), np.array([20, 20])]
)
def test_wrong_step_counts(steps: Any) -> None:
    with pytest.raises(UsageError, match="2 to 999") as caught:
        plms_table(steps)
    assert caught.value.value is steps and caught.value.exit_code == 2
    assert caught.value.remedy


def test_etas_of_the_paper() -> None:
    etas = eta_table(50, AlignmentSettings(eta0=0.7))
    table = plms_table(50)
    assert etas.dtype == torch.float64 and etas.shape == (51,)
    assert int(etas.count_nonzero()) == 50 and etas[1] == 0
    expected = 0.7 * (1 - alphas_cumprod()[table.timesteps[table.aligns]]).sqrt()
    torch.testing.assert_close(etas[table.aligns], expected, rtol=1e-14, atol=0)
    assert not eta_table(50, AlignmentSettings(eta0=0)).any()


@untimed
@given(
    steps=st.integers(2, 120),
    window=st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted),
)
def test_eta_window_is_half_open(steps: int, window: list[int]) -> None:
    start, end = (share / 10 for share in window)
    etas = eta_table(steps, AlignmentSettings(eta0=1, window=(start, end)))
    aligned = etas[plms_table(steps).aligns]
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
    table = plms_table(50)
    times = table.timesteps[table.aligns]
    sampled = eta_table(50, settings)[table.aligns] > 0
    assert torch.equal(in_window(times, settings), sampled)
    # each of the others goes with the step whose 20 timesteps it is among
    everywhere = in_window(torch.arange(1000), settings)
    assert torch.equal(everywhere, sampled.flip(0).repeat_interleave(20))


def test_windows_of_the_two_halves_share_no_step() -> None:
    whole = eta_table(50, AlignmentSettings())
    halves = [eta_table(50, AlignmentSettings(window=w)) for w in ((0.0, 0.3), (0.3, 1.0))]
    assert [int(h.count_nonzero()) for h in halves] == [15, 35]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise_equals_ddpm_scheduler(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    z0, noise = (torch.randn(5, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    expected = DDPMScheduler(**BETAS).add_noise(z0, noise, timesteps)
    noisy = add_noise(z0, noise, timesteps)
    assert noisy.dtype == dtype
    torch.testing.assert_close(noisy, expected, rtol=2e-5, atol=2e-5)
    # diffusers rounds the alphas to half before it takes roots of them; we do not
    half = add_noise(z0.half(), noise.half(), timesteps)
    torch.testing.assert_close(half, noisy.half(), rtol=2e-3, atol=4e-3)


def test_steps_may_be_numpys() -> None:
    table = plms_table(20)
    for steps in (np.int64(20), np.uint8(20), np.float64(20), np.array(20), torch.tensor([20])):
        assert plms_table(steps) is table  # type: ignore[arg-type]
        assert torch.equal(eta_table(steps, ETA), eta_table(20, ETA))  # type: ignore[arg-type]


ETA = AlignmentSettings(eta0=2.0, window=(0.2, 0.7))


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
