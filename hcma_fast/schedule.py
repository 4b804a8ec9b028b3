"""Noise schedule and the PLMS coefficient table, computed once on the host in float64.

PLMS is pseudo linear multistep sampling (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion
Models on Manifolds", arXiv:2202.09778, Eq. 9 and 12), as Stable Diffusion v1 runs it: S steps,
S + 1 evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import UsageError
from hcma_fast.scalars import whole_number

TRAIN_STEPS = 1000
_PAPER_STEPS = 50
STEPS_OFFSET = 1
BETA_START, BETA_END = 0.00085, 0.012

#: Adams-Bashforth weights of [current, previous, 2 back, 3 back] by the length of the history
_MULTISTEP = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


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


class PLMSRow(NamedTuple):
    """One evaluation of a :class:`PLMSTable`."""

    timestep: int
    step: int
    weights: list[float]
    sample_scale: float
    noise_scale: float
    uses_stored_sample: bool
    pushes_history: bool
    aligns: bool


@dataclass(frozen=True, eq=False)
class PLMSTable:
    """Everything that PLMS needs per evaluation k of K = steps + 1, as host tensors.

    A table equals itself alone: tensors have no single truth, and tables are keys of caches.

    z_next = sample_scale[k] * z_ref + noise_scale[k] * sum_j history_weights[k, j] * eps_j with
    eps_0 the current noise prediction, eps_1 the previous one in the history, and so on. ``z_ref``
    is the current latent, but at the corrector (evaluation 1) the one that evaluation 0 started
    from.
    """

    timesteps: Tensor
    """(K,) int64"""
    step_index: Tensor
    """(K,) int64, the PLMS step that an evaluation belongs to; 0, 0, 1, 2 ..."""
    history_weights: Tensor
    """(K, 4) float64"""
    sample_scale: Tensor
    """(K,) float64"""
    noise_scale: Tensor
    """(K,) float64"""
    uses_stored_sample: Tensor
    """(K,) bool, the corrector only"""
    pushes_history: Tensor
    """(K,) bool, all but the corrector"""
    aligns: Tensor
    """(K,) bool, all but the corrector: the alignment runs once per PLMS step"""

    def __len__(self) -> int:
        return len(self.timesteps)

    def rows(self) -> list[PLMSRow]:
        """The same as plain numbers, an entry per evaluation: for loops on the host."""
        return [
            PLMSRow(*values)
            for values in zip(
                self.timesteps.tolist(),
                self.step_index.tolist(),
                self.history_weights.tolist(),
                self.sample_scale.tolist(),
                self.noise_scale.tolist(),
                self.uses_stored_sample.tolist(),
                self.pushes_history.tolist(),
                self.aligns.tolist(),
                strict=True,
            )
        ]


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


def plms_table(num_inference_steps: int) -> PLMSTable:
    """The PLMS table for ``num_inference_steps`` steps; kept, so do not modify it.

    Raises:
        UsageError: see :func:`check_steps`.
    """
    return _plms_table(check_steps(num_inference_steps))


@lru_cache(maxsize=32)
def _plms_table(num_inference_steps: int) -> PLMSTable:
    stride = TRAIN_STEPS // num_inference_steps
    descending = [i * stride + STEPS_OFFSET for i in reversed(range(num_inference_steps))]
    times = [descending[0], descending[1], *descending[1:]]
    count = len(times)
    alphas = alphas_cumprod()

    def abar(timestep: int) -> Tensor:
        return alphas[max(timestep, 0)]

    weights = torch.zeros(count, 4, dtype=torch.float64)
    sample_scale = torch.zeros(count, dtype=torch.float64)
    noise_scale = torch.zeros(count, dtype=torch.float64)
    for k, time in enumerate(times):
        # the corrector repeats step 0 with the mean of both predictions
        start = times[0] if k == 1 else time
        now, later = abar(start), abar(start - stride)
        sample_scale[k] = (later / now).sqrt()
        denominator = now * (1 - later).sqrt() + (now * (1 - now) * later).sqrt()
        noise_scale[k] = -(later - now) / denominator
        weights[k] = torch.tensor(
            (0.5, 0.5, 0.0, 0.0) if k == 1 else _MULTISTEP[min(max(k - 1, 0), 3)],
            dtype=torch.float64,
        )
    corrector = torch.arange(count) == 1
    return PLMSTable(
        timesteps=torch.tensor(times),
        step_index=(torch.arange(count) - 1).clamp(min=0),
        history_weights=weights,
        sample_scale=sample_scale,
        noise_scale=noise_scale,
        uses_stored_sample=corrector,
        pushes_history=~corrector,
        aligns=~corrector,
    )


def eta_table(num_inference_steps: int, settings: AlignmentSettings) -> Tensor:
    """Alignment rate per evaluation, (K,) float64: eta0 sqrt(1 - abar_t) inside the window, else 0.

    The window [start, end) holds shares of the steps; the corrector never aligns.
    """
    num_inference_steps = check_steps(num_inference_steps)
    table = plms_table(num_inference_steps)
    inside = _inside(table.step_index, num_inference_steps, settings) & table.aligns
    rates = settings.eta0 * (1 - alphas_cumprod()[table.timesteps]).sqrt()
    return torch.where(inside, rates, torch.zeros_like(rates))


def in_window(timesteps: Tensor, settings: AlignmentSettings) -> Tensor:
    """Does a run of the paper's 50 steps align around these timesteps?

    Its step i is at t = 981 - 20 i, and stands here for the 20 timesteps 980 - 20 i to 999 - 20 i.
    So training, which draws any t, aligns where :func:`eta_table` does.

    Args:
        timesteps: (B,) int64 in [0, 1000). Returns (B,) bool.
    """
    step = (TRAIN_STEPS - 1 - timesteps) // (TRAIN_STEPS // _PAPER_STEPS)
    return _inside(step, _PAPER_STEPS, settings)


def _inside(step: Tensor, steps: int, settings: AlignmentSettings) -> Tensor:
    """Which of ``steps`` steps, counted from the noise, are in the window [start, end)."""
    share = step.double() / steps
    start, end = settings.window
    return (share >= start) & (share < end)


def grounded_steps(grounding_beta: float, num_inference_steps: int) -> int:
    """Steps, from the first, with gated attention: the share is cut to whole steps.

    As in GLIGEN's own code (``alpha_generator``): ``int(share * length)``, in float64.
    """
    return int(grounding_beta * num_inference_steps)
