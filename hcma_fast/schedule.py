"""Noise schedule of Stable Diffusion v1, and which timesteps are aligned: float64 on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import UsageError
from hcma_fast.scalars import whole_number

TRAIN_STEPS = 1000
_PAPER_STEPS = 50
STEPS_OFFSET = 1
BETA_START, BETA_END = 0.00085, 0.012


def alphas_cumprod() -> Tensor:
    """abar_t of Stable Diffusion's scaled-linear schedule, (1000,) float64, decreasing."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def add_noise(z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """q_sample (DDPM, Eq. 4): sqrt(abar_t) z0 + sqrt(1 - abar_t) noise.

    Args:
        z0: (B, C, h, w) scaled latent; noise: same shape; timesteps: (B,) int64 in [0, 1000).
    """
    alphas = alphas_cumprod().to(z0.device)[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt().to(z0.dtype) * z0 + (1 - alphas).sqrt().to(z0.dtype) * noise


def check_steps(num_inference_steps: object) -> int:
    """The number of steps as a Python int; numpy's numbers are taken too.

    Raises:
        UsageError: not a whole number, fewer than 2 or more than 999 steps.
    """
    try:
        steps = whole_number(num_inference_steps)
    except ValueError:
        steps = 0
    if not 2 <= steps < TRAIN_STEPS:
        raise UsageError(
            "the number of inference steps must be a whole number from 2 to 999",
            value=num_inference_steps,
            remedy="The paper uses 50; 20 gives a quick preview.",
        )
    return steps


def in_window(timesteps: Tensor, settings: AlignmentSettings) -> Tensor:
    """Does a run of the paper's 50 steps align around these timesteps?

    Its step i is at t = 981 - 20 i, and stands here for the 20 timesteps 980 - 20 i to 999 - 20 i.
    So training, which draws any t, aligns where ``sampling.schedule.eta_table`` does.

    Args:
        timesteps: (B,) int64 in [0, 1000). Returns (B,) bool.
    """
    step = (TRAIN_STEPS - 1 - timesteps) // (TRAIN_STEPS // _PAPER_STEPS)
    return inside_window(step, _PAPER_STEPS, settings)


def inside_window(step: Tensor, steps: int, settings: AlignmentSettings) -> Tensor:
    """Which of ``steps`` steps, counted from the noise, are in the window [start, end)."""
    share = step.double() / steps
    start, end = settings.window
    return (share >= start) & (share < end)


def grounded_steps(grounding_beta: float, num_inference_steps: int) -> int:
    """Steps, from the first, with gated attention: the share is cut to whole steps.

    As in GLIGEN's own code (``alpha_generator``): ``int(share * length)``, in float64.
    """
    return int(grounding_beta * num_inference_steps)
