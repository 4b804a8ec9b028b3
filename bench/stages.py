"""Suites of single stages: the alignment gradient, builds by the command line, training."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hcma_fast.bench.contestants import (
    SD14,
    Ours,
    build_missing,
    components_of,
    weights_hash_of,
)
from hcma_fast.bench.harness import Case, Group
from hcma_fast.bench.memory import peak_rss_mib
from hcma_fast.bench.plan import Plan
from hcma_fast.bench.workers import Contestant
from hcma_fast.config import GRAD_BACKENDS

if TYPE_CHECKING:
    from hcma_fast.models.weights import Components

_CALLS = 10
"""Of the gradient in a run: one alone is too short for a clock"""


def align(plan: Plan) -> list[Group]:
    """What can compute the alignment gradient (runtime.gradient); a run is 10 calls of it."""
    names = [
        name
        for name in GRAD_BACKENDS
        if plan.on_gpu or name != "triton"  # which needs a GPU
    ]
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
    import torch

    from hcma_fast.export.graphs import random_inputs
    from hcma_fast.runtime.gradient import gradient_engine

    parts = _with_aligner(model)
    spec = parts.specs()["align"]
    engine = gradient_engine(name, parts, spec, device)
    drawn = random_inputs(spec, batch, torch.Generator().manual_seed(0))
    inputs = {key: value.to(device) for key, value in drawn.items()}
    # the rate is 1, not random: the step is what is compared
    inputs["eta"] = torch.ones_like(inputs["eta"])

    def generate() -> NDArray[np.float32]:
        for _ in range(calls):
            found = engine(inputs)["z_aligned"]
        step: NDArray[np.float32] = (found - inputs["z"]).cpu().numpy()
        return step

    return Contestant(generate, parts.preset, parts.weights_hash, device)


def _with_aligner(model: str) -> Components:
    """The parts, of which at full size only the aligner has weights."""
    if model != SD14:
        return components_of(model)
    from hcma_fast.models.aligner import AlignStep
    from hcma_fast.models.random_sd14 import RandomSD14

    source = RandomSD14()
    step = source.graph("align")
    assert isinstance(step, AlignStep)
    return replace(source.without_weights(), aligner=step.aligner)


def build(plan: Plan) -> list[Group]:
    """``hcma-fast build`` into an empty folder, once per backend: seconds, MiB, peak memory."""
    names = list(plan.backends)
    if not names:
        names = ["onnxruntime"] if plan.quick else [*plan.chosen, "torch-compile"]
    names = [name for name in names if name != "eager"]
    cases = [
        Case(
            name,
            partial(load_build, plan.model, name),
            {"backend": name},
            max_error=None,
            warm_up=False,
        )
        for name in names
    ]
    return [Group("build", cases)]


def build_command(model: str, backend: str, out: str) -> list[str]:
    """``hcma-fast build`` as a command of this interpreter."""
    command = [sys.executable, "-m", "hcma_fast.cli.app", "build", "--model", model]
    command += ["--backend", backend, "--out", out]
    return command + (["--random-weights"] if model == SD14 else [])


def load_build(model: str, backend: str) -> Contestant:
    """A build from nothing, inductor's cache included.

    Raises:
        WeightsError: no such model.
    """
    figures: dict[str, float] = {}

    def generate() -> NDArray[np.float32]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
            out = Path(folder) / "engine"
            figures["build_peak_mib"] = peak_rss_mib(build_command(model, backend, str(out)))
            sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
            figures["engine_mib"] = sum(sizes) / 2**20
        return np.zeros(1, np.float32)

    return Contestant(generate, *weights_hash_of(model), figures=lambda: dict(figures))


def train(plan: Plan) -> list[Group]:
    """Stage 1 of the aligner from a cache of random latents; an image is a sample."""
    steps, batch = (2, 8) if plan.quick else (10, 64 if plan.model != SD14 else 16)
    cases = [
        Case(
            name,
            partial(load_training, plan.model, steps, batch, bf16, plan.device),
            {"batch": batch, "steps": steps},
            steps * batch,
            max_error=None,
        )
        for name, bf16 in (("float32", False), ("bfloat16 autocast", True))
    ]
    return [Group("aligner training", cases)]


def load_training(model: str, steps: int, batch: int, bf16: bool, device: str) -> Contestant:
    """Some steps of :func:`hcma_fast.train.aligner.train_aligner`, with its checkpoint at the end.

    The figure ``loop_samples_per_second`` is the training loop's own, without that.

    Raises:
        WeightsError: no such model.
    """
    from hcma_fast.train.aligner import train_aligner
    from hcma_fast.train.aligner_settings import AlignerTraining

    parts = _with_aligner(model)
    training = AlignerTraining(
        batch=batch,
        micro_batch=batch,
        max_steps=steps,
        log_every=steps,
        bf16=bf16,
        tensorboard=False,
    )
    folder = tempfile.TemporaryDirectory()  # gone with this process at the latest
    cache = Path(folder.name) / "cache"
    # of which 80% are trained on: one epoch is enough
    write_random_cache(cache, parts, 16 + steps * batch * 3 // 2)
    figures: dict[str, float] = {}

    def progress(done: int, total: int, record: dict[str, object] | None) -> None:
        if record is not None:
            rate = record["samples_per_second"]
            assert isinstance(rate, float)
            figures["loop_samples_per_second"] = rate

    def generate() -> NDArray[np.float32]:
        with tempfile.TemporaryDirectory(dir=folder.name) as out:
            train_aligner(
                cache, Path(out), training, parts.aligner, cpu=device == "cpu", progress=progress
            )
        return np.zeros(1, np.float32)

    for parameter in parts.aligner.parameters():
        parameter.requires_grad_()
    return Contestant(
        generate, parts.preset, parts.weights_hash, device, figures=lambda: dict(figures)
    )


def write_random_cache(folder: Path, parts: Components, count: int) -> None:
    """A cache as ``hcma-fast train cache`` writes it, of noise: ``count`` images with one view, one
    caption and two boxes each."""
    import torch

    from hcma_fast.files import make_folder, write_whole
    from hcma_fast.train.cache import (
        HEADER_FILE,
        LABELS_FILE,
        CacheHeader,
        CacheNotes,
        pack,
        shard_file,
    )

    make_folder(folder)
    config = parts.aligner.config
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    header = CacheHeader(
        preset=parts.preset,
        vae_sha256="0" * 64,
        text_sha256="0" * 64,
        annotations_sha256="0" * 64,
        split="noise",
        image_count=count,
        image_size=parts.image_size,
        min_area=0.0,
        views=1,
        latent_shape=shape,
        scaling_factor=float(parts.vae.config.scaling_factor),
        text_width=config.text_width,
        labels=("a", "b"),
        shard_size=count,
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "image_ids": torch.arange(count),
        "latents": torch.randn(count, 1, 2, *shape, generator=generator).half(),
        "caption_starts": torch.arange(count + 1),
        "captions": torch.randn(count, config.text_width, generator=generator),
        "caption_flips": torch.zeros(count, dtype=torch.bool),
        "box_starts": 2 * torch.arange(count + 1),
        "boxes": torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.5, 0.9, 0.9]]).repeat(count, 1),
        "labels": torch.tensor([0, 1]).repeat(count),
    }
    notes = CacheNotes(header=header.digest)
    table = {"labels": torch.randn(2, config.text_width, generator=generator)}
    for name, content in (
        (LABELS_FILE, pack(table, notes)),
        (shard_file(0), pack(tensors, notes)),
        (HEADER_FILE, header.model_dump_json().encode()),
    ):
        write_whole(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
