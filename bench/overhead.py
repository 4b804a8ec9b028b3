"""What the sampler itself costs per step, with engines that do nothing.

Left are the loop, its look-ups, and the few elementwise operators of guidance, PLMS and step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from hcma_fast.bench.machine import Machine, describe_machine
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import UsageError
from hcma_fast.models.random_sd14 import RandomSD14
from hcma_fast.models.weights import Components, load_components
from hcma_fast.runtime.sampler import Conditioning, Schedule, sample, sample_fused
from hcma_fast.specs import BATCH, MAX_BATCH, GraphName, IOSpec, TensorSpec

GOAL_MS = 0.3
"""Per step."""
_SAMPLERS: dict[str, tuple[Callable[..., object], tuple[GraphName, ...]]] = {
    "sampler": (sample, ("align", "unet_grounded", "unet_plain")),
    "fused sampler": (sample_fused, ("step_grounded", "step_plain")),
}


class NoOpEngine:
    """An engine that hands out the same tensors of the right shapes, and counts its calls.

    Args:
        batch: what the graph gets; outputs are zeros, made once.
    """

    def __init__(self, spec: IOSpec, batch: int) -> None:
        self.spec = spec
        self.calls = 0
        self._outputs = {tensor.name: zeros(tensor, batch) for tensor in spec.outputs}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing is computed, and no input is looked at."""
        self.calls += 1
        return self._outputs


def zeros(tensor: TensorSpec, batch: int) -> Tensor:
    """A tensor as the spec has it."""
    sizes = [batch if size == BATCH else int(size) for size in tensor.shape]
    return torch.zeros(sizes, dtype=getattr(torch, tensor.dtype))


class OverheadRow(BaseModel):
    """One sampler; milliseconds per PLMS step, over the runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    calls: dict[str, int]
    """of each engine in one run"""


class OverheadReport(BaseModel):
    """What :func:`measure_overhead` found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    batch: int
    num_inference_steps: int
    rounds: int
    goal_ms: float = GOAL_MS
    rows: tuple[OverheadRow, ...]
    machine: Machine


def measure_overhead(
    model: str = "tiny", *, batch: int = 1, num_inference_steps: int = 50, rounds: int = 30
) -> OverheadReport:
    """Run the samplers in turns on engines that do nothing, guided and aligned at every step.

    Args:
        model: whose shapes are taken: ``sd14`` (no weights needed), a preset, a folder or hub id.
        batch: images at once.
        rounds: timed runs of each, after one that is not.

    Raises:
        UsageError: a number out of its range.
        WeightsError: no such model.
    """
    for what, value, most in (("batch", batch, MAX_BATCH // 2), ("rounds", rounds, 100_000)):
        if not 1 <= value <= most:
            remedy = f"Use 1 to {most}."
            raise UsageError(f"{what} is out of its range", value=value, remedy=remedy)
    schedule = Schedule.of(num_inference_steps, AlignmentSettings())
    parts = RandomSD14().without_weights() if model == "sd14" else load_components(model)
    conditioning = no_op_conditioning(parts, batch)
    specs = parts.specs()
    z = zeros(specs["align"].inputs[0], batch)
    seconds: dict[str, list[float]] = {name: [] for name in _SAMPLERS}
    calls: dict[str, dict[str, int]] = {}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, (run, graphs) in _SAMPLERS.items():
                engines = {
                    graph: NoOpEngine(specs[graph], 2 * batch if graph[:4] == "unet" else batch)
                    for graph in graphs
                }
                start = perf_counter()
                run(engines, z, conditioning, schedule)
                seconds[name].append(perf_counter() - start)
                calls[name] = {graph: engine.calls for graph, engine in engines.items()}
    return OverheadReport(
        preset=parts.preset,
        batch=batch,
        num_inference_steps=num_inference_steps,
        rounds=rounds,
        rows=tuple(
            # the first run is the warm-up
            _row(name, np.array(taken[1:]) * 1e3 / num_inference_steps, calls[name])
            for name, taken in seconds.items()
        ),
        machine=describe_machine(),
    )


def _row(name: str, taken_ms: NDArray[np.float64], calls: dict[str, int]) -> OverheadRow:
    p10, median, p90 = (float(value) for value in np.percentile(taken_ms, [10, 50, 90]))
    return OverheadRow(name=name, median_ms=median, p10_ms=p10, p90_ms=p90, calls=calls)


def no_op_conditioning(parts: Components, batch: int) -> Conditioning:
    """Zeros: nothing looks at them."""
    specs = parts.specs()
    fixed = {t.name: t for name in ("align", "unet_grounded") for t in specs[name].inputs}
    both = {"text_context": 2 * batch, "grounding_context": 2 * batch}
    names = Conditioning.__dataclass_fields__
    return Conditioning(**{name: zeros(fixed[name], both.get(name, batch)) for name in names})
