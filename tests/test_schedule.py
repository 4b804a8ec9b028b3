"""The noise schedule, checked against diffusers' PNDMScheduler and DDPMScheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler

from hcma_fast.schedule import add_noise, alphas_cumprod

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
