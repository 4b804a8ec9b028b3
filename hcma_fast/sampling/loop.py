"""The sampler: all evaluations of a batch (paper Algorithm 1, lines 15 to 23)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hcma_fast.engine import Engine
from hcma_fast.sampling.conditioning import Conditioning
from hcma_fast.sampling.schedule import Schedule, StepLosses, evaluation_networks, fusable
from hcma_fast.sampling.state import SeparateGraphs, StepGraphs
from hcma_fast.specs import GraphName


def sample(
    engines: Mapping[GraphName, Engine],
    z: Tensor,
    conditioning: Conditioning,
    schedule: Schedule,
    on_evaluation: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[StepLosses]]:
    """Run all evaluations from noise ``z`` (B, 4, h, w) to the clean, scaled latent.

    By the step graphs where there are any that can run this schedule, else by the separate ones.
    ``on_evaluation`` gets the evaluation's number and the new latent, and returns the latent to
    go on with.
    """
    guided = len(conditioning.text_context) == 2 * len(z)
    fused = guided and fusable(engines, [schedule])
    make = StepGraphs if fused else SeparateGraphs
    state = make(engines, conditioning, z, [schedule], captured=None)
    with torch.no_grad():
        state.load(z, conditioning, [schedule])
        networks = evaluation_networks([schedule])
        for k, needed in enumerate(networks):
            state.advance(state.launches(needed))
            if on_evaluation is not None:
                state.z.copy_(on_evaluation(k, state.latent()))
    return state.latent(), state.losses([schedule], networks)
