"""An export is done when it computes what torch computes, on inputs it has not seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcma_fast.errors import EngineError
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.specs import BATCH, IOSpec

TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative error that a graph may have against torch in float32, by precision."""

#: (batch, valid boxes, alignment rate): other batches than the traced one, no box and all 30,
#: no step and one a thousand times too long; batches are moved into the range of the graph
_CASES = ((1, 3, 1.0), (2, 0, 1.0), (5, 30, 1.0), (2, 1, 0.0), (1, 5, 1e3))

MANY_WEIGHTS, _MANY_PIXELS = 200_000_000, 2**19
"""Of a graph, from which a run takes seconds, and its weights gigabytes."""

Runner = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Reference:
    """Inputs of a graph, and what torch makes of them."""

    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]


def references(
    spec: IOSpec, module: nn.Module, *, vocabulary: int, cases: int | None = None
) -> list[Reference]:
    """What ``module`` gives on fresh random inputs.

    Args:
        cases: how many, at most five; None for all.
    """
    found = []
    for inputs in itertools.islice(_inputs(spec, vocabulary), cases):
        with torch.no_grad():
            outputs = module(*(inputs[name] for name in spec.input_names))
        found.append(Reference(inputs, outputs))
    return found


def compare(spec: IOSpec, expected: Sequence[Reference], run: Runner) -> float:
    """Largest relative error of ``run`` over all inputs and outputs.

    Relative means: largest absolute difference over the largest absolute value of the reference.

    Raises:
        EngineError: an output has another shape or dtype than the reference, or one of both
            is not finite.
    """
    worst = 0.0
    for case in expected:
        found = run(case.inputs)
        for tensor, reference in zip(spec.outputs, case.outputs, strict=True):
            worst = max(worst, _relative_error(spec, tensor.name, found[tensor.name], reference))
    return worst


def on_device(run: Runner, device: str) -> Runner:
    """``run``, whose tensors are on ``device``, as a function of tensors on the CPU."""

    def moved(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = run({name: value.to(device) for name, value in inputs.items()})
        return {name: value.cpu() for name, value in found.items()}

    return run if device == "cpu" else moved


def measure(
    spec: IOSpec, module: nn.Module, run: Runner, *, vocabulary: int, cases: int | None = None
) -> float:
    """:func:`compare` of ``run`` with ``module``, on ``cases`` inputs."""
    return compare(spec, references(spec, module, vocabulary=vocabulary, cases=cases), run)


def cases_for(spec: IOSpec, module: nn.Module) -> int | None:
    """One input, not all five, where each would take seconds and gigabytes."""
    pixels = sum(math.prod(int(s) for s in t.shape if s != BATCH) for t in spec.outputs)
    weights = sum(parameter.numel() for parameter in module.parameters())
    # the other graphs' large outputs are little work
    heavy = weights > MANY_WEIGHTS or (spec.graph == "vae_decoder" and pixels > _MANY_PIXELS)
    return 1 if heavy else None


def _inputs(spec: IOSpec, vocabulary: int) -> Iterator[dict[str, Tensor]]:
    for seed, (batch, boxes, eta) in enumerate(_CASES):
        generator = torch.Generator().manual_seed(1000 + seed)
        size = min(max(batch, spec.batch.min), spec.batch.max)
        inputs = random_inputs(spec, size, generator, vocabulary, boxes)
        if "eta" in inputs:
            inputs["eta"] = torch.full_like(inputs["eta"], eta)
        yield inputs


def _relative_error(spec: IOSpec, name: str, found: Tensor, reference: Tensor) -> float:
    if (found.shape, found.dtype) != (reference.shape, reference.dtype):
        raise _wrong(spec, name, f"{tuple(found.shape)} {found.dtype}", reference)
    if not bool(found.isfinite().all() and reference.isfinite().all()):
        raise _wrong(spec, name, "values that are not finite, or torch does", reference)
    scale = reference.abs().max().clamp(min=1e-6)
    return float((found - reference).abs().max() / scale)


def _wrong(spec: IOSpec, name: str, found: str, reference: Tensor) -> EngineError:
    return EngineError(
        f"the exported graph {spec.graph} gives {name} as {found}",
        value=f"torch: {tuple(reference.shape)} {reference.dtype}",
        remedy="This is a fault of the export: report it with the versions of hcma-fast doctor.",
    )
