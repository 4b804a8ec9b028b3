"""Whole images at full size with random weights, texts and decoding included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from statistics import median

from hcma_fast.bench.gpu_check.device import Device
from hcma_fast.bench.gpu_check.weights import model_parts
from hcma_fast.bench.gpu_check.worker import Case, Figures
from hcma_fast.bench.speed.harness.contestants import LAYOUT, PROMPT
from hcma_fast.engine import Engine
from hcma_fast.export.backends.eager import eager_engines
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.specs import GraphName


def cases(device: Device, *, small: bool, result: Path) -> list[Case]:
    """Steps and images at once, the most asked-for first; captured, but for one."""
    bench = _Images(device, small)
    if small:
        return [
            Case("3 steps, batch 2", partial(bench.run, 3, 2)),
            Case("3 steps, batch 1, without graphs", partial(bench.run, 3, 1, False)),
        ]
    pairs = [(15, 1), (50, 1), (15, 4), (15, 16), (50, 4), (50, 16)]
    return [
        *(Case(f"{n} steps, batch {size}", partial(bench.run, n, size)) for n, size in pairs),
        Case("15 steps, batch 1, without graphs", partial(bench.run, 15, 1, False)),
    ]


class _Images:
    def __init__(self, device: Device, small: bool) -> None:
        self.device, self.small = device, small

    @cached_property
    def parts(self) -> Components:
        return model_parts(self.device.place, small=self.small)

    @cached_property
    def engines(self) -> Mapping[GraphName, Engine]:
        graphs, specs = self.parts.graphs(), self.parts.specs()
        return eager_engines(graphs, specs, self.device.place, self.device.half)

    @cached_property
    def replay(self) -> ReplaySampler:
        return ReplaySampler(self.engines, self.device.place, capture=self.device.capture())

    def run(self, steps: int, batch: int, captured: bool = True) -> Figures:
        """Seconds of a batch, the medians of three."""
        pipe = HCMAPipeline(
            self.engines,
            self.parts.tokenizer,
            self.parts.info,
            backend="eager",
            weights_hash=self.parts.weights_hash,
            device=self.device.place,
        )
        pipe.replay = self.replay if captured else None

        def generate() -> None:
            pipe(
                [PROMPT] * batch,
                LAYOUT,
                seed=list(range(batch)),
                num_inference_steps=steps,
                # random weights: a large weight would only make the latent diverge
                guidance_scale=1.5,
                output_type="pt",
            )

        times = self.device.seconds(generate, 1 if self.small else 3, warm_up=1)
        return {
            "model": "tiny" if self.small else "sd14",
            "steps": steps,
            "batch": batch,
            "precision": self.device.half,
            "captured": captured,
            "median_s": median(times),
            "image_s": median(times) / batch,
            "images_per_s": batch / median(times),
            "peak_mib": self.device.peak_mib(),
        }
