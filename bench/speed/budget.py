"""What one image costs, in counts instead of times: ``python -m hcma_fast.bench.speed.budget``.

Operations and bytes of each graph of `tiny`, what the sampler itself adds per image, and how often
a whole call of the pipeline runs each graph. A test compares them with the committed budget. When a
change makes the product leaner, or dearer for a reason, write the new numbers:

    python -m hcma_fast.bench.speed.budget > tests/bench/speed/budget.json
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

from hcma_fast.bench.estimates.counting import count_module
from hcma_fast.bench.speed.harness.contestants import PROMPT, Work
from hcma_fast.bench.speed.suites.overhead import (
    NoOpEngine,
    no_op_conditioning,
    no_op_engines,
    zeros,
)
from hcma_fast.config import AlignmentSettings
from hcma_fast.engine import Engine
from hcma_fast.export.backends.split_batch import rows_of
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import GRAPH_NAMES, GraphName, IOSpec

STEPS = 50
IMAGES = 4
"""Of the larger batch, whose calls are as many as those of one image"""
Counts = dict[str, dict[str, int]]
_SLACK = {"python_calls": 0.1}
"""Other versions of Python and torch may call a little more, or less"""
_LEANER = 0.8
"""Share of a budget below which it is no budget any more"""
_EXACT = frozenset(("engine_calls", *GRAPH_NAMES))
"""What a change of versions does not change"""


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
    """Per graph one call for one image with guidance; per sampler one image of 50 steps.

    Per pipeline call the calls of each graph.
    """
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
    found["pipeline, one image"] = count_pipeline(parts, 1)
    found[f"pipeline, {IMAGES} images"] = count_pipeline(parts, IMAGES)
    return found


class _Empty:
    """An engine of zeros for whatever batch comes; it counts its calls."""

    def __init__(self, spec: IOSpec) -> None:
        self.spec = spec
        self.calls = 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        batch = rows_of(inputs, self.spec)
        return {tensor.name: zeros(tensor, batch) for tensor in self.spec.outputs}


def count_pipeline(parts: Components, images: int) -> dict[str, int]:
    """How often one call of the pipeline, from texts to images, runs each graph: 50 steps, guided.

    The images of a batch have prompts and layouts of their own, and share the calls.
    """
    specs = parts.specs()
    engines = {name: _Empty(specs[name]) for name in GRAPH_NAMES}
    given: dict[GraphName, Engine] = dict(engines)
    pipe = HCMAPipeline(
        given, parts.tokenizer, parts.info, backend="eager", weights_hash=parts.weights_hash
    )
    prompts = [f"{PROMPT} {i}" for i in range(images)]
    layouts = [Work(boxes=2 + i).layout for i in range(images)]
    pipe(prompts, layouts, num_inference_steps=STEPS, seed=0)
    return {name: engine.calls for name, engine in engines.items()}


def over_budget(found: Counts, budget: Counts) -> list[str]:
    """What costs more than its budget, or so much less that the budget is stale.

    Calls of engines are exact. All else may be up to a fifth leaner.
    """
    if found.keys() != budget.keys():
        return [f"the parts differ: {sorted(found.keys() ^ budget.keys())}"]
    problems = []
    for part, counts in found.items():
        for what in {**budget[part], **counts}:
            value, most = counts.get(what), budget[part].get(what)
            if value is None or most is None:
                problems.append(f"{part}: {what} {value}, budget {most}")
            elif what in _EXACT:
                problems += [f"{part}: {what} {value}, not {most}"] if value != most else []
            elif value > most * (1 + _SLACK.get(what, 0)):
                problems.append(f"{part}: {what} {value}, budget {most}")
            elif value < most * _LEANER:
                problems.append(f"{part}: {what} {value}, leaner than its budget {most}")
    return problems


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
