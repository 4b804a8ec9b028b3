"""What the sampler itself costs per step, with engines that do nothing.

Left are the loop, its look-ups, and the few elementwise operators of guidance, PLMS and step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcma_fast.bench.speed.harness.contestants import components_of, weights_hash_of
from hcma_fast.bench.speed.harness.plan import Plan
from hcma_fast.bench.speed.harness.rounds import Case, Group
from hcma_fast.bench.speed.harness.workers import Contestant
from hcma_fast.config import AlignmentSettings
from hcma_fast.specs import BATCH, GRAPH_NAMES, STEP_NAMES, GraphName, IOSpec, TensorSpec

if TYPE_CHECKING:
    from hcma_fast.engine import Engine
    from hcma_fast.models.checkpoint.folder import Components
    from hcma_fast.sampling.conditioning import Conditioning

GOAL_MS = 0.3
"""Per step."""
_TRAJECTORIES = 20
"""In a run: one alone is too short for a clock"""
_SAMPLERS: dict[str, tuple[GraphName, ...]] = {
    "sampler": GRAPH_NAMES,
    "sampler with step graphs": STEP_NAMES,
    # on a GPU it is captured and replayed; on a CPU the same code is called
    "captured sampler": GRAPH_NAMES,
    "captured sampler with step graphs": (*GRAPH_NAMES, *STEP_NAMES),
}


class NoOpEngine:
    """An engine that hands out the same tensors of the right shapes, and counts its calls.

    Args:
        batch: what the graph gets; outputs are zeros, made once.
    """

    def __init__(self, spec: IOSpec, batch: int, device: str = "cpu") -> None:
        self.spec = spec
        self.calls = 0
        self._outputs = {tensor.name: zeros(tensor, batch, device) for tensor in spec.outputs}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing is computed, and no input is looked at."""
        self.calls += 1
        return self._outputs


def zeros(tensor: TensorSpec, batch: int, device: str = "cpu") -> Tensor:
    """A tensor as the spec has it."""
    sizes = [batch if size == BATCH else int(size) for size in tensor.shape]
    return torch.zeros(sizes, dtype=getattr(torch, tensor.dtype), device=device)


def no_op_engines(
    specs: Mapping[GraphName, IOSpec],
    names: tuple[GraphName, ...],
    batch: int = 1,
    device: str = "cpu",
) -> dict[GraphName, NoOpEngine]:
    """Of these graphs, for a batch of images with guidance."""
    return {
        name: NoOpEngine(specs[name], 2 * batch if name.startswith("unet") else batch, device)
        for name in names
    }


def overhead(plan: Plan) -> list[Group]:
    """The samplers in turns, with guidance and an alignment at every step; figure: ms per step."""
    steps, trajectories = (4, 1) if plan.quick else (50, _TRAJECTORIES)
    return [
        Group(
            f"sampler alone, the goal is {GOAL_MS} ms per step",
            [
                Case(
                    name,
                    partial(load_sampler, plan.model, name, steps, trajectories, plan.device),
                    {"batch": 1, "steps": steps, "trajectories": trajectories},
                    trajectories,
                    max_error=None,  # zeros in, zeros out
                )
                for name in _SAMPLERS
            ],
        )
    ]


def load_sampler(
    model: str, name: str, steps: int, trajectories: int, device: str = "cpu"
) -> Contestant:
    """A sampler on engines of the model's shapes that do nothing; its figure is ms per step.

    Args:
        name: of the cases of :func:`overhead`.

    Raises:
        WeightsError: no such model.
    """
    from time import perf_counter

    from hcma_fast.sampling.schedule import Schedule

    parts = components_of(model, drawn=())
    specs = parts.specs()
    engines = no_op_engines(specs, _SAMPLERS[name], device=device)
    schedule = Schedule.of(steps, AlignmentSettings())
    conditioning = no_op_conditioning(parts, 1, device)
    z = zeros(specs["align"].inputs[0], 1, device)
    run = _sampler(name, dict(engines), device)
    taken: list[float] = []

    def generate() -> NDArray[np.float32]:
        start = perf_counter()
        with torch.no_grad():
            for _ in range(trajectories):
                found, _ = run(z, conditioning, schedule)
            result: NDArray[np.float32] = found.cpu().numpy()  # waits for a GPU
        taken.append(perf_counter() - start)
        return result

    def figures() -> dict[str, float]:
        # of the timed runs so far: the first one warms up
        median = float(np.median(taken[1:] or taken))
        return {"ms_per_step": median * 1e3 / (trajectories * steps)}

    return Contestant(generate, *weights_hash_of(model), device, figures)


def _sampler(
    name: str, engines: Mapping[GraphName, Engine], device: str
) -> Callable[..., tuple[Tensor, object]]:
    from hcma_fast.sampling.loop import sample
    from hcma_fast.sampling.replay import ReplaySampler

    if name.startswith("captured"):
        return ReplaySampler(engines, device)
    return partial(sample, engines)


def no_op_conditioning(parts: Components, batch: int, device: str = "cpu") -> Conditioning:
    """Zeros: nothing looks at them."""
    from hcma_fast.sampling.conditioning import CONTEXTS, Conditioning

    specs = parts.specs()
    graphs: tuple[GraphName, ...] = ("align", "unet_grounded", "grounding")
    fixed = {t.name: t for name in graphs for t in specs[name].inputs}
    both = dict.fromkeys((*CONTEXTS, "encoder_hidden_states"), 2 * batch)
    names = Conditioning.__dataclass_fields__
    return Conditioning(
        **{name: zeros(fixed[name], both.get(name, batch), device) for name in names}
    )
