"""The reference that every executor of a step is held to: diffusers' schedulers in float64.

The networks are two small functions, so that the executors differ in nothing but the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS, AlignmentSettings
from hcma_fast.sampling.savings import EXACT, Savings
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.sampling.solvers import Solver, ddim, dpmpp_2m, plms
from hcma_fast.schedule import alphas_cumprod

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVERS: dict[str, Solver] = {"plms": plms, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
SHAPE = (4, 8, 8)


def align(z: Tensor, eta: Tensor) -> Tensor:
    """z: (B, C, h, w); eta: (B,)."""
    return z - eta.view(-1, 1, 1, 1) * torch.cos(z)


def predict(z: Tensor, timestep: Tensor, half: Tensor | float) -> Tensor:
    """A noise prediction that is not linear; ``half`` is 0 for the unconditional one."""
    time = timestep.view(-1, 1, 1, 1).to(z.dtype) / 1000
    return 0.5 * torch.sin(z + half) + 0.3 * time * z


def start(image: int) -> Tensor:
    """(C, h, w) float64."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(image))
    return noise.double()


def make_schedule(
    solver: str, steps: int, eta0: float = 0.4, guidance: float = 3.0, savings: Savings = EXACT
) -> Schedule:
    settings = AlignmentSettings(eta0=eta0, window=(0.0, 1.0), guidance_scale=guidance)
    return Schedule.of(steps, settings, savings, SOLVERS[solver])


def scheduler_of(solver: str, schedule: Schedule) -> Any:
    """diffusers' own, in float64, at the timesteps of the schedule."""
    steps, times = schedule.steps, schedule.table.timesteps
    if solver == "dpmpp_2m":
        made = DPMSolverMultistepScheduler(
            **BETAS, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="sigma_min"
        )
        made.config.lower_order_final, made.config.euler_at_final = True, True
        made.set_timesteps(steps)
        made.timesteps = times
        made.num_inference_steps = steps
        abar = alphas_cumprod()[torch.cat([times, torch.zeros(1, dtype=torch.int64)])]
        made.sigmas = ((1 - abar) / abar).sqrt()
        made._step_index = 0
        return made
    kind = {"plms": PNDMScheduler, "ddim": DDIMScheduler}[solver]
    extra = {"skip_prk_steps": True} if solver == "plms" else {"clip_sample": False}
    made = kind(**BETAS, set_alpha_to_one=False, steps_offset=1, **extra)
    made.set_timesteps(steps)
    made.alphas_cumprod = alphas_cumprod()
    made.final_alpha_cumprod = made.alphas_cumprod[0]
    assert made.timesteps.tolist() == times.tolist()
    return made


def expected(solver: str, schedule: Schedule, image: int) -> list[Tensor]:
    """The latents (C, h, w) after every evaluation, in float64."""
    scheduler = scheduler_of(solver, schedule)
    z, found, predictions = start(image).unsqueeze(0), list[Tensor](), list[Tensor]()
    rows = zip(schedule.table.timesteps, schedule.etas, schedule.table.aligns, strict=True)
    for time, eta, aligns in rows:
        # the corrector of PLMS starts from the latent that its scheduler stored
        if aligns:
            z = align(z, eta.view(1))
        one = time.view(1)
        unconditional, conditional = predict(z, one, 0), predict(z, one, 1)
        eps = unconditional + schedule.guidance_scale * (conditional - unconditional)
        if solver == "dpmpp_2m":
            predictions.append(scheduler.convert_model_output(eps, sample=z))
            z = dpm_step(scheduler, predictions, z, len(schedule.table))
        else:
            z = scheduler.step(eps, time, z).prev_sample
        found.append(z[0])
    return found


def dpm_step(scheduler: Any, predictions: list[Tensor], z: Tensor, count: int) -> Tensor:
    """As ``scheduler.step``, which would round a float64 latent to float32."""
    if scheduler.step_index in (0, count - 1):
        moved: Tensor = scheduler.dpm_solver_first_order_update(predictions[-1], sample=z)
    else:
        moved = scheduler.multistep_dpm_solver_second_order_update(predictions[-2:], sample=z)
    scheduler._step_index += 1
    return moved


class Function:
    """An engine that computes a function of its inputs."""

    spec: Any = None

    def __init__(self, function: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        self.function = function

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.function(inputs)


def align_function(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The graph `align`; its losses are the means of the latents, which tell images apart."""
    z = inputs["z"]
    mean = z.flatten(1).mean(1)
    return {
        "z_aligned": align(z, inputs["eta"]),
        "loss_global": mean,
        "loss_local": mean.unsqueeze(1).expand(-1, MAX_OBJECTS),
    }


def unet_function(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both UNets; the two halves of the guidance differ in their context."""
    z, half = inputs["sample"], inputs["text_context"][:, 0, 0]
    return {"noise_pred": predict(z, inputs["timestep"], half.view(-1, 1, 1, 1))}
