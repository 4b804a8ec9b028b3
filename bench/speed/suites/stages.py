"""Suites of single stages: the alignment gradient, the UNet, builds by the command line."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hcma_fast.bench.shared.memory import peak_rss_mib
from hcma_fast.bench.speed.harness.contestants import (
    SD14,
    Ours,
    build_missing,
    components_of,
    open_graph,
    weights_hash_of,
)
from hcma_fast.bench.speed.harness.plan import Plan, side_by_side
from hcma_fast.bench.speed.harness.rounds import Case, Group
from hcma_fast.bench.speed.harness.workers import Contestant
from hcma_fast.config import GRAD_BACKENDS

if TYPE_CHECKING:
    from hcma_fast.engine import Engine

_CALLS = 10
"""Of the gradient in a run: one alone is too short for a clock"""


def align(plan: Plan) -> list[Group]:
    """What can compute the alignment gradient: the gradient backends (runtime.gradient), and the
    pipeline's own engines; a run is 10 calls of it."""
    # triton needs a GPU; onnx is the engine of ONNX Runtime in float32
    onnx = Ours("onnxruntime")
    left_out = [*([] if plan.on_gpu else ["triton"]), *([] if onnx in plan.chosen else ["onnx"])]
    names = [name for name in GRAD_BACKENDS if name not in left_out]
    engines = [ours for ours in plan.chosen if ours not in (Ours("eager"), onnx)]
    calls = 2 if plan.quick else _CALLS
    return [
        Group(
            f"alignment gradient, batch {batch}",
            [
                Case(
                    name,
                    partial(load_gradient, plan.model, name, batch, calls, plan.device),
                    {"batch": batch, "calls": calls},
                    batch * calls,
                    prepare=partial(
                        build_missing, plan.model, Ours("eager", grad_backend=name), None
                    ),
                )
                for name in names
            ]
            + [
                Case(
                    ours.label,
                    partial(load_align, plan.model, ours, batch, calls, plan.device),
                    {"batch": batch, "calls": calls},
                    batch * calls,
                    ours.max_error,
                    prepare=partial(build_missing, plan.model, ours, None, device=plan.device),
                )
                for ours in engines
            ],
        )
        for batch in ((1,) if plan.quick else (1, 8))
    ]


def load_gradient(model: str, name: str, batch: int, calls: int, device: str) -> Contestant:
    """The graph `align` on one gradient backend, on random inputs; its result is the step.

    Raises:
        WeightsError: no such model.
        BackendError: the gradient backend cannot run here.
    """
    from hcma_fast.runtime.gradient import gradient_engine

    parts = components_of(model, drawn=("aligner",))
    engine = gradient_engine(name, parts, parts.specs()["align"], device)
    return _align_calls(engine, model, batch, calls, device)


def load_align(model: str, ours: Ours, batch: int, calls: int, device: str) -> Contestant:
    """As :func:`load_gradient`, by a compiled engine.

    Raises:
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
    """
    return _align_calls(open_graph(model, ours, "align", device), model, batch, calls, device)


def _align_calls(engine: Engine, model: str, batch: int, calls: int, device: str) -> Contestant:
    import torch

    from hcma_fast.export.onnx.trace import random_inputs

    spec = engine.spec
    drawn = random_inputs(spec, batch, torch.Generator().manual_seed(0))
    inputs = {key: value.to(device) for key, value in drawn.items()}
    # the rate is 1, not random: the step is what is compared
    inputs["eta"] = torch.ones_like(inputs["eta"])

    def generate() -> NDArray[np.float32]:
        for _ in range(calls):
            found = engine(inputs)["z_aligned"]
        step: NDArray[np.float32] = (found - inputs["z"]).cpu().numpy()
        return step

    return Contestant(generate, *weights_hash_of(model), device)


def unet(plan: Plan) -> list[Group]:
    """The grounded UNet alone, for one image with guidance: its rate, and that of a product."""
    kinds = [ours for ours in plan.chosen if ours.backend != "eager"]
    calls = 2 if plan.quick or plan.model == SD14 else _CALLS
    cases = [
        Case(
            "torch eager" if ours.backend == "eager" else ours.label,
            partial(load_unet, plan.model, ours, calls, plan.device),
            {"calls": calls},
            calls,
            ours.max_error,
            prepare=partial(build_missing, plan.model, ours, None, device=plan.device),
        )
        for ours in (Ours("eager"), *kinds)
    ]
    return side_by_side(plan, "UNet, batch 2", cases)


def load_unet(model: str, ours: Ours, calls: int, device: str) -> Contestant:
    """The graph `unet_grounded` alone on random inputs, batch 2; its result is the noise.

    Figures: its operations per second, the median of all runs but the first, and the share that
    this is of a large product's rate in the same precision, measured after each run.

    Raises:
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
    """
    import torch

    from hcma_fast.bench.estimates.counting import count_module
    from hcma_fast.bench.shared.rates import matmul_rate
    from hcma_fast.export.onnx.trace import random_inputs
    from hcma_fast.models.checkpoint.random_sd14 import RandomSD14

    engine = open_graph(model, ours, "unet_grounded", device)
    parts = RandomSD14().without_weights() if model == SD14 else components_of(model)
    flops = count_module(parts.graph("unet_grounded"), engine.spec, 2).flops
    drawn = random_inputs(engine.spec, 2, torch.Generator().manual_seed(0))
    inputs = {key: value.to(device) for key, value in drawn.items()}
    rates: list[float] = []
    peaks: list[float] = []

    @torch.no_grad()
    def generate() -> NDArray[np.float32]:
        started = time.perf_counter()
        for _ in range(calls):
            found = engine(inputs)["noise_pred"]
        noise: NDArray[np.float32] = found.cpu().numpy()
        rates.append(flops * calls / (time.perf_counter() - started) / 1e9)
        return noise

    def tell() -> dict[str, float]:
        peaks.append(matmul_rate(getattr(torch, ours.precision), device) / 1e9)
        rate, peak = (float(np.median(found[1:] or found)) for found in (rates, peaks))
        return {"gflops": rate, "matmul_gflops": peak, "share_of_matmul": rate / peak}

    return Contestant(generate, *weights_hash_of(model), device, figures=tell)


def build(plan: Plan) -> list[Group]:
    """``hcma-fast build`` into an empty folder, once per backend: seconds, MiB, peak memory."""
    every = [ours for ours in plan.chosen if ours.backend != "eager"]
    if not plan.backends:
        native = [] if plan.on_gpu else [Ours("torch-compile")]
        every = every[:1] if plan.quick else [*every, *native]
    cases = [
        Case(
            ours.label,
            partial(load_build, plan.model, ours, plan.device),
            {"backend": ours.backend, "precision": ours.precision},
            max_error=None,
            warm_up=False,
        )
        for ours in every
    ]
    return [Group("build", cases)] if cases else []


def build_command(model: str, ours: Ours, out: str, device: str = "cpu") -> list[str]:
    """``hcma-fast build`` as a command of this interpreter."""
    target = ours.target(None, device)
    assert target is not None, "eager builds nothing"
    command = [sys.executable, "-m", "hcma_fast.cli.app", "build", "--model", model]
    command += ["--backend", ours.backend, "--precision", ours.precision, "--out", out]
    command += [] if target.device == "cpu" else ["--device", target.device]
    # the engines that the other suites run
    command += [] if target.batch is None else ["--batch", str(target.batch)]
    return command + (["--random-weights"] if model == SD14 else [])


def load_build(model: str, ours: Ours, device: str = "cpu") -> Contestant:
    """A build from nothing, inductor's cache included.

    Raises:
        WeightsError: no such model.
    """
    figures: dict[str, float] = {}

    def generate() -> NDArray[np.float32]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
            out = Path(folder) / "engine"
            figures["build_peak_mib"] = peak_rss_mib(build_command(model, ours, str(out), device))
            sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
            figures["engine_mib"] = sum(sizes) / 2**20
        return np.zeros(1, np.float32)

    return Contestant(generate, *weights_hash_of(model), figures=lambda: dict(figures))
