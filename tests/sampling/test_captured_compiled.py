"""Engines by torch-compile (AOTInductor) in the captured sampler, which is called here, on a CPU.

What is shown is that the evaluation is right around engines whose code and memory torch cannot see.
test_compiled_gpu.py has those of a GPU, in CUDA graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hcma_fast.engine import Engine
from hcma_fast.export.backends.aoti.build import compile_aoti
from hcma_fast.export.backends.aoti.engine import CompiledEngine
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.sampling.capture import no_capture
from hcma_fast.sampling.exported import graph_of
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import Savings
from hcma_fast.specs import GraphName, IOSpec

from captures import Counted, conditioned, make_engines, noise, plan, relative

COMPILED: tuple[GraphName, ...] = ("align", "unet_grounded")


class Traced:
    """An engine whose inputs' addresses and results are noted; the results by weak references."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: set[tuple[int, ...]] = set()
        self.results: list[weakref.ref[Tensor]] = []

    @property
    def spec(self) -> IOSpec:
        return self.engine.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.addresses.add(tuple(inputs[name].data_ptr() for name in self.spec.input_names))
        found = self.engine(inputs)
        self.results += [weakref.ref(value) for value in found.values()]
        return found


@pytest.mark.slow
def test_compiled_engines_in_the_captured_sampler(
    tmp_path: Path, random_components: Components
) -> None:
    reference = make_engines(random_components)
    engines = dict(reference)
    for name in COMPILED:
        spec, path = reference[name].spec, tmp_path / f"{name}.pt2"
        compile_aoti(spec, graph_of(random_components, name), path)
        engines[name] = Traced(CompiledEngine(path, spec))
    schedules = [plan(), plan(savings=Savings(align_every=2, contexts_once=False))]
    for capture in (Counted(), no_capture):
        sampler = ReplaySampler(engines, "cpu", capture=capture)
        for images in ([0, 1], [2, 1]):
            given = conditioned(random_components, reference, images)
            for schedule in schedules:
                expected, losses = sample(reference, noise(images), given, schedule)
                found, ours = sampler(noise(images), given, schedule)
                assert relative(found, expected) < 1e-4
                for one, other in zip(ours, losses, strict=True):
                    torch.testing.assert_close(
                        one.loss_global, other.loss_global, rtol=1e-3, atol=1e-4
                    )
        for name in COMPILED:
            traced = engines[name]
            assert isinstance(traced, Traced)
            # one shape: the same buffers in every evaluation of every batch
            assert len(traced.addresses) == 1
            # what an engine allocates is done with when the evaluation is
            assert traced.results and not any(ref() is not None for ref in traced.results)
            traced.addresses.clear()
            traced.results.clear()
