"""Latents of fixed requests, to compare two commits on one machine: are the images the same bits?

    python -m hcma_fast.bench.speed.same_bits --record before.npz   # at one commit
    python -m hcma_fast.bench.speed.same_bits --compare before.npz  # at the other

Requests cover windows, gates, savings, batches, step graphs and the captured samplers (whose
rules run on a CPU), by torch eager and by ONNX Runtime. Bits differ between processors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hcma_fast.config import AlignmentSettings
from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.export.cache import find_or_build
from hcma_fast.export.target import Target
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.runtime.generator import BatchGenerator, Request
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.capture import CaptureMode
from hcma_fast.sampling.exported import graph_of
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import Savings
from hcma_fast.specs import STEP_NAMES

Latents = dict[str, NDArray[np.float32]]
Backend = Literal["eager", "onnxruntime"]
BACKENDS: tuple[Backend, ...] = ("eager", "onnxruntime")
STEPS = 6
PROMPT = "a dog beside a pizza"
LAYOUT = Layout(["dog", "pizza"], [[0.05, 0.3, 0.45, 0.9], [0.5, 0.5, 0.95, 0.9]])
SCENES: tuple[tuple[str, Layout], ...] = (
    (PROMPT, LAYOUT),
    ("a cat", Layout(["cat"], [[0.2, 0.1, 0.8, 0.7]])),
    ("nothing else", Layout.empty()),
)

#: arguments of the pipeline, by what they exercise
CALLS: Mapping[str, Mapping[str, Any]] = {
    "whole-window": {"align_window": (0.0, 1.0)},
    "window": {"align_window": (0.2, 0.7)},
    "gate": {"grounding_beta": 0.3, "align_window": (0.0, 1.0)},
    "ungrounded": {"grounding_beta": 0.0, "eta0": 0.0},
    "unguided": {"guidance_scale": 1.0},
    "negative": {"negative_prompt": "cat", "guidance_scale": 4.0, "lambda_local": 0.3},
    "align-every": {"savings": Savings(align_every=2), "align_window": (0.0, 1.0)},
    "guidance-end": {"savings": Savings(guidance_end=0.5)},
    "narrow": {"savings": Savings(latent_dtype="bfloat16", align_every=3)},
    "nothing-saved": {
        "savings": Savings(skip_idle_alignment=False, contexts_once=False, skip_closed_gate=False),
        "grounding_beta": 0.5,
        "align_window": (0.0, 0.5),
    },
}


def again(function: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
    """A capture without a GPU: it warms up, and calls the function again at each replay."""
    warm_up()
    return function


def open_pipeline(parts: Components, backend: Backend, *, fused: bool = False) -> HCMAPipeline:
    """A pipeline of these components; ``fused``: with step graphs."""
    if backend == "onnxruntime":
        target = Target(backend="onnxruntime", fuse="step" if fused else "none")
        return HCMAPipeline.from_engines(find_or_build(parts.weights_hash, lambda: parts, target))
    pipe = HCMAPipeline.from_components(parts)
    if fused:
        specs = parts.specs()
        steps = {name: EagerEngine(graph_of(parts, name), specs[name]) for name in STEP_NAMES}
        pipe.engines = {**pipe.engines, **steps}
    return pipe


def latents_of(pipe: HCMAPipeline, **arguments: Any) -> NDArray[np.float32]:
    """(B, 4, h, w) of one call."""
    given = {"num_inference_steps": STEPS, "seed": 7, "output_type": "latent", **arguments}
    prompt, layout = given.pop("prompt", PROMPT), given.pop("layout", LAYOUT)
    return pipe(prompt, layout, **given).latents.numpy()


def mixed_batch(pipe: HCMAPipeline) -> NDArray[np.float32]:
    """(3, 4, h, w) of three requests with settings of their own, in one batch."""
    base = pipe.settings
    settings: list[AlignmentSettings] = [
        base,
        base.model_copy(update={"window": (0.0, 1.0), "grounding_beta": 0.4}),
        base.model_copy(update={"guidance_scale": 3.0, "eta0": 0.0}),
    ]
    requests = [
        Request(prompt, layout, seed=i, num_inference_steps=STEPS + i, settings=own)
        for i, ((prompt, layout), own) in enumerate(zip(SCENES, settings, strict=True))
    ]
    results = sorted(BatchGenerator(pipe).generate(requests), key=lambda result: result.index)
    return torch.stack([result.latent for result in results]).numpy()


def record(parts: Components, backend: Backend) -> Latents:
    """The latents of all requests by one backend."""
    pipe = open_pipeline(parts, backend)
    found = {name: latents_of(pipe, **arguments) for name, arguments in CALLS.items()}
    prompts, layouts = zip(*SCENES, strict=True)
    batch = {"prompt": prompts, "layout": layouts}
    found["batch"] = latents_of(pipe, **batch)
    found["mixed"] = mixed_batch(pipe)
    fused = open_pipeline(parts, backend, fused=True)
    found["step-graphs"] = latents_of(fused, align_window=(0.0, 1.0), **batch)
    found["step-graphs-gate"] = latents_of(fused, align_window=(0.0, 1.0), grounding_beta=0.5)
    modes: tuple[CaptureMode, ...] = ("step", "trajectory")
    for mode in modes:
        for name, engines in (("captured", pipe.engines), ("captured-step-graphs", fused.engines)):
            pipe.replay = ReplaySampler(engines, "cpu", mode=mode, capture=again)
            found[f"{name}-{mode}"] = latents_of(pipe, align_window=(0.0, 1.0))
        found[f"captured-mixed-{mode}"] = mixed_batch(pipe)
        found[f"captured-narrow-{mode}"] = latents_of(pipe, **CALLS["narrow"])
    return {f"{backend}/{name}": values for name, values in found.items()}


def compare(before: Mapping[str, NDArray[np.float32]], after: Latents) -> list[str]:
    """A line for each request whose bits differ, with the size of the difference."""
    lines = [f"{name}: in one file only" for name in sorted(set(before) ^ set(after))]
    for name in sorted(set(before) & set(after)):
        one, other = before[name], after[name]
        if one.tobytes() != other.tobytes():
            size = np.linalg.norm(one - other) / np.linalg.norm(one)
            lines.append(f"{name}: {size:.2g} relative")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny", help="Preset or folder.")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--record", type=Path, metavar="FILE", help="Write the latents (npz).")
    way.add_argument("--compare", type=Path, metavar="FILE", help="Compare with recorded latents.")
    args = parser.parse_args()
    parts = load_components(args.model)
    found = {name: values for each in BACKENDS for name, values in record(parts, each).items()}
    if args.record is not None:
        np.savez(args.record, **found)  # type: ignore[arg-type]
        print(f"{len(found)} requests recorded.")
        return 0
    with np.load(args.compare) as before:
        lines = compare(before, found)
    print("\n".join([*lines, f"{len(found)} requests, {len(lines)} differ."]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
