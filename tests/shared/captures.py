"""What the tests of the captured samplers run: engines, conditioning, schedules, counted captures.

pytest puts this folder on sys.path (pyproject.toml): values that parameters are made of cannot be
fixtures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from hcma_fast.config import AlignmentSettings
from hcma_fast.engine import Engine
from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.sampling.capture import no_capture
from hcma_fast.sampling.conditioning import Conditioning, condition
from hcma_fast.sampling.exported import graph_of
from hcma_fast.sampling.savings import EXACT, Savings
from hcma_fast.sampling.schedule import Schedule, eta_table
from hcma_fast.sampling.solvers import Solver, plms
from hcma_fast.specs import GRAPH_NAMES, GraphName, IOSpec

STEPS = 6
TEXTS = ["ab", "c", "xyz"]
LAYOUTS = [
    Layout(phrases=["a", "b"], boxes=[[0.1, 0.1, 0.5, 0.6], [0.4, 0.5, 0.9, 1.0]]),
    Layout(phrases=[], boxes=[]),
    Layout(phrases=["c"], boxes=[[0.0, 0.0, 0.3, 0.3]]),
]


def make_engines(
    parts: Components, device: str = "cpu", names: Sequence[GraphName] = GRAPH_NAMES
) -> dict[GraphName, Engine]:
    """Graphs by torch eager; on another device than the CPU, copies of them."""
    specs = parts.specs()
    modules = {name: graph_of(parts, name) for name in names}
    if device != "cpu":
        modules = {name: deepcopy(module).to(device) for name, module in modules.items()}
    return {name: EagerEngine(module, specs[name]) for name, module in modules.items()}


def conditioned(
    parts: Components,
    engines: Mapping[GraphName, Engine],
    images: list[int],
    guided: bool = True,
    device: str = "cpu",
) -> Conditioning:
    """Of the texts and layouts above, by number."""
    return condition(
        engines,
        parts.tokenizer,
        [TEXTS[i] for i in images],
        [""] * len(images) if guided else None,
        [LAYOUTS[i] for i in images],
        device,
    )


def noise(images: list[int]) -> Tensor:
    """(B, 4, 8, 8), of each image its own."""
    return torch.cat(
        [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in images]
    )


def plan(
    steps: int = STEPS,
    eta0: float = 2.0,
    guidance: float = 3.0,
    beta: float = 1.0,
    window: tuple[float, float] = (0.0, 1.0),
    savings: Savings = EXACT,
    lambdas: tuple[float, float] = (1.0, 0.5),
    solver: Solver = plms,
) -> Schedule:
    table = solver(steps)
    etas = eta_table(table, AlignmentSettings(eta0=eta0, window=window))
    return Schedule(table, etas, lambdas, guidance, beta, savings)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Counted:
    """A capture that warms up as on a GPU, and counts captures and replays."""

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0

    def __call__(
        self, function: Callable[[], None], warm_up: Callable[[], None]
    ) -> Callable[[], None]:
        self.captures += 1
        for _ in range(3):
            warm_up()
        replay = no_capture(function, warm_up)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


class Counting:
    """An engine that counts its calls."""

    def __init__(self, engine: Engine, calls: Counter[str]) -> None:
        self.engine, self.calls = engine, calls

    @property
    def spec(self) -> IOSpec:
        return self.engine.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls[self.spec.graph] += 1
        return self.engine(inputs)
