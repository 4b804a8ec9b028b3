"""Latents of fixed requests against committed ones: what a change of the sampler would move.

Bits differ between processors, hence the tolerances. To compare two commits to the bit, see
``hcma_fast.bench.speed.same_bits``. After a change that is meant to move latents, write new ones:

    HCMA_FAST_WRITE_LATENTS=1 pytest tests/sampling/test_reference_latents.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hcma_fast.bench.speed.same_bits import CALLS, SCENES, latents_of, mixed_batch, open_pipeline
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.runtime.pipeline import HCMAPipeline

FILE = Path(__file__).with_name("reference_latents.npz")
TINY = ("whole-window", "gate", "unguided", "align-every", "guidance-end")
WRITE = "HCMA_FAST_WRITE_LATENTS" in os.environ
TOLERANCE = {"narrow": 5e-2}
"""Relative; else 2e-3. A float32 bit may tip a rounding to bfloat16."""


Latents = dict[str, NDArray[np.float32]]


def eager_latents(random_components: Components) -> Latents:
    eager = open_pipeline(random_components, "eager")
    found = {f"random/{name}": latents_of(eager, **CALLS[name]) for name in CALLS}
    found["random/mixed"] = mixed_batch(eager)
    fused = open_pipeline(random_components, "eager", fused=True)
    found["random/step-graphs"] = latents_of(fused, align_window=(0.0, 1.0))
    tiny = open_pipeline(load_components("tiny"), "eager")
    found |= {f"tiny/{name}": latents_of(tiny, **CALLS[name]) for name in TINY}
    prompts, layouts = zip(*SCENES, strict=True)
    found["tiny/batch"] = latents_of(tiny, prompt=prompts, layout=layouts)
    return found


@pytest.mark.skipif(not WRITE, reason="writes the reference")
def test_write_the_reference(random_components: Components) -> None:
    found = {name: z.astype(np.float16) for name, z in eager_latents(random_components).items()}
    np.savez_compressed(FILE, **found)  # type: ignore[arg-type]


def errors(found: Latents) -> dict[str, float]:
    """Relative distances to the committed latents of the same names, where above tolerance."""
    with np.load(FILE) as reference:
        known = {name: reference[name].astype(np.float32) for name in found}
    distances = {
        name: float(np.linalg.norm(z - known[name]) / np.linalg.norm(known[name]))
        for name, z in found.items()
    }
    return {n: e for n, e in distances.items() if e > TOLERANCE.get(n.split("/")[1], 2e-3)}


def test_eager_latents_are_the_committed_ones(random_components: Components) -> None:
    assert FILE.stat().st_size < 300_000
    found = eager_latents(random_components)
    assert not errors(found)
    # the requests differ by far more than the tolerance
    for name in ("gate", "unguided", "align-every", "guidance-end"):
        assert errors({"tiny/whole-window": found[f"tiny/{name}"]}), name


def test_compiled_latents_are_the_committed_ones(random_engine: Path) -> None:
    pipe = HCMAPipeline.from_engines(random_engine)
    assert not errors({f"random/{name}": latents_of(pipe, **CALLS[name]) for name in CALLS})
