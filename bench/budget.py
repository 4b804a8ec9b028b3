"""What one image costs, in numbers that no clock can blur: ``python -m hcma_fast.bench.budget``.

Operations and bytes of each graph of `tiny`, and what the sampler itself adds per image. A test
compares them with the committed budget, tests/bench/budget.json; who makes the product leaner, or
has a reason to make it dearer, writes the new numbers there:

    python -m hcma_fast.bench.budget > tests/bench/budget.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcma_fast.bench.counting import count_module
from hcma_fast.bench.overhead import NoOpEngine, no_op_conditioning, no_op_engines, zeros
from hcma_fast.config import AlignmentSettings
from hcma_fast.models.weights import Components, load_components
from hcma_fast.runtime.cudagraph import ReplaySampler
from hcma_fast.runtime.engine import Engine
from hcma_fast.runtime.sampler import Schedule, sample
from hcma_fast.specs import GRAPH_NAMES, GraphName

STEPS = 50
Counts = dict[str, dict[str, int]]


class _Operators(TorchDispatchMode):
    """Counts operators, and the tensors in memory of their own that they make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators, self.allocations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        known = {_memory(leaf) for leaf in tree_leaves((args, kwargs))}
        self.allocations += sum(_memory(leaf) not in known for leaf in tree_leaves(result))
        return result


def _memory(leaf: object) -> int:
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, Tensor) else 0


def count_tiny() -> Counts:
    """Per graph one call for one image with guidance; per sampler one image of 50 steps."""
    parts = load_components("tiny")
    specs = parts.specs()
    found: Counts = {}
    for name in GRAPH_NAMES:
        batch = 2 if name.startswith("unet") else 1
        counts = count_module(parts.graph(name), specs[name], batch)
        found[name] = {
            "flops": counts.flops,
            "weights_bytes": counts.weights_bytes,
            "io_bytes": counts.io_bytes,
            "unfused_bytes": sum(operation.bytes for operation in counts.operations),
        }
    engines: dict[GraphName, Engine] = dict(no_op_engines(specs, GRAPH_NAMES))
    replay = ReplaySampler(engines, "cpu")
    samplers: Mapping[str, Callable[..., object]] = {
        "sampler": lambda *given: sample(engines, *given),
        "replayed sampler": replay,
    }
    for sampler, run in samplers.items():
        found[sampler] = _count_sampler(run, parts, engines)
    return found


def _count_sampler(
    run: Callable[..., object], parts: Components, engines: Mapping[GraphName, Engine]
) -> dict[str, int]:
    schedule = Schedule.of(STEPS, AlignmentSettings())
    z = zeros(parts.specs()["align"].inputs[0], 1)
    given = (z, no_op_conditioning(parts, 1), schedule)
    with torch.no_grad():
        run(*given)  # makes what is made once
        before = _calls(engines)
        with _Operators() as counter:
            run(*given)
        engine_calls = _calls(engines) - before
        python_calls = _python_calls(lambda: run(*given))
    return {
        "engine_calls": engine_calls,
        "operators": counter.operators,
        "allocations": counter.allocations,
        "python_calls": python_calls,
    }


def _calls(engines: Mapping[GraphName, Engine]) -> int:
    return sum(engine.calls for engine in engines.values() if isinstance(engine, NoOpEngine))


def _python_calls(function: Callable[[], object]) -> int:
    """Functions, of Python and of C, that are called."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


if __name__ == "__main__":
    print(json.dumps(count_tiny(), indent=2))
