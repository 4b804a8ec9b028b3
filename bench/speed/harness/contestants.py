"""What the speed suites run: the same scene by a plain diffusers loop and by our pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hcma_fast.bench.speed.harness.report import Label
from hcma_fast.bench.speed.harness.rounds import HALF_ERROR, MAX_ERROR
from hcma_fast.bench.speed.harness.workers import Contestant, worker
from hcma_fast.config import BACKENDS, MAX_OBJECTS, check_backend
from hcma_fast.errors import BackendError, UsageError
from hcma_fast.layout import Layout
from hcma_fast.specs import BatchRange, GraphName

if TYPE_CHECKING:
    from hcma_fast.engine import Engine
    from hcma_fast.export.manifest import VerifiedFolder
    from hcma_fast.export.target import Target
    from hcma_fast.models.checkpoint.folder import Components
    from hcma_fast.runtime.pipeline import HCMAPipeline
    from hcma_fast.sampling.capture import CaptureMode

PROMPT = "a dog to the left of a pizza on a green field"
LAYOUT = Layout(["dog", "pizza"], [(0.05, 0.3, 0.45, 0.9), (0.5, 0.5, 0.95, 0.9)])
SEED = 0
SD14 = "sd14"
"""The full-size preset, with random weights: nothing is downloaded"""
_WORDS = (
    "dog pizza cat car bird boat bus horse sheep cow bear zebra kite cup fork knife "
    "spoon apple cake chair bed book clock vase train truck bench sofa tie ball"
)
_THINGS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Work:
    """What the contestants of a group generate."""

    steps: int = 50
    batch: int = 1
    boxes: int = 2
    """per image, a phrase of its own for each"""
    side: int | None = None
    """of the images, in pixels; None for the trained size"""
    evaluations: int | None = None
    """stop after so many denoising evaluations, and decode nothing; None: to the image"""
    eta0: float | None = None
    """None: the checkpoint's own"""

    @property
    def layout(self) -> Layout:
        """Of every image of the batch.

        Raises:
            UsageError: more boxes than an image may have.
        """
        if self.boxes == len(LAYOUT):
            return LAYOUT
        if not 0 <= self.boxes <= MAX_OBJECTS:
            raise UsageError(
                "an image has 0 to 30 boxes", value=self.boxes, remedy="Use another number."
            )
        places = [(i % 6 / 6, i // 6 / 5) for i in range(self.boxes)]
        return Layout(_THINGS[: self.boxes], [(x, y, x + 0.16, y + 0.19) for x, y in places])

    @property
    def seeds(self) -> list[int]:
        """One per image."""
        return [SEED + i for i in range(self.batch)]

    @property
    def labels(self) -> dict[str, Label]:
        """For a report."""
        found: dict[str, Label] = {"batch": self.batch, "steps": self.steps, "boxes": self.boxes}
        named = {"size": self.side, "evaluations": self.evaluations, "eta0": self.eta0}
        return found | {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Ours:
    """Our pipeline: what computes its graphs."""

    backend: str = "onnxruntime"
    graphs: tuple[GraphName, ...] | None = None
    """those that the backend computes, the others being eager; None for all"""
    grad_backend: str | None = None
    precision: str = "float32"
    fuse: bool = False
    """a whole evaluation in one graph"""
    cuda_graphs: CaptureMode | None = None

    @classmethod
    def named(cls, text: str) -> Ours:
        """From ``backend`` or ``backend:precision``.

        Raises:
            UsageError: no such backend.
            BackendError: it does not compute in this precision.
        """
        backend, _, precision = text.partition(":")
        check_backend(backend)
        found = cls(backend, precision=precision or "float32")
        if backend == "eager" and found.precision != "float32":
            raise BackendError(
                "the suites compare with eager in float32", value=text, remedy="Use eager."
            )
        found.target(None)
        return found

    @property
    def label(self) -> str:
        """Backend, precision where that is not float32, and if it is captured."""
        label = self.backend + ("" if self.precision == "float32" else f" {self.precision}")
        return f"{label}, CUDA graphs" if self.cuda_graphs else label

    @property
    def max_error(self) -> float:
        """Relative error above which a row of it is void."""
        return MAX_ERROR if self.precision == "float32" else HALF_ERROR

    def target(self, side: int | None, device: str = "cpu") -> Target | None:
        """What must be built for it to run on ``device``; None for eager."""
        from hcma_fast.export.target import TRT_LIBRARIES, Target, device_for

        if self.backend == "eager":
            return None
        return Target(
            backend=self.backend,
            precision=self.precision,  # type: ignore[arg-type]  # which is checked there
            # TensorRT's own default ends at 8
            batch=BatchRange(1, 1, 32) if self.backend in TRT_LIBRARIES else None,
            height=side,
            width=side,
            fuse="step" if self.fuse else "none",
            device=device_for(self.backend, device),
        )


def load_plain(model: str | Path, work: Work, device: str = "cpu") -> Contestant:
    """The plain diffusers loop.

    Raises:
        WeightsError: as in ``load_components``.
    """
    return plain_contestant(components_of(model, device), work, device)


def plain_contestant(
    parts: Components,
    work: Work,
    device: str = "cpu",
    *,
    unet: Callable[..., object] | None = None,
    losses: Callable[..., object] | None = None,
) -> Contestant:
    """The plain loop on loaded parts; ``unet`` and ``losses`` as in ``plain_generate``."""
    # here and below: the parent unpickles a reference to a function, and needs no diffusers
    from hcma_fast.bench.speed.harness.plain_loop import plain_generate

    settings = parts.settings
    if work.eta0 is not None:
        settings = settings.model_copy(update={"eta0": work.eta0})

    def generate() -> NDArray[np.float32]:
        _, latents = plain_generate(
            parts,
            [PROMPT] * work.batch,
            [work.layout] * work.batch,
            work.seeds,
            num_inference_steps=work.steps,
            settings=settings,
            unet=unet,
            losses=losses,
            evaluations=work.evaluations,
        )
        return latents.cpu().numpy()

    return Contestant(generate, parts.preset, parts.weights_hash, device)


def load_ours(model: str | Path, ours: Ours, work: Work, device: str = "cpu") -> Contestant:
    """Our pipeline.

    Raises:
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
    """
    pipe = open_pipe(model, ours, side=work.side, device=device)

    def generate() -> NDArray[np.float32]:
        out = pipe(
            [PROMPT] * work.batch,
            work.layout,
            seed=work.seeds,
            num_inference_steps=work.steps,
            eta0=work.eta0,
        )
        return out.latents.cpu().numpy()

    some = work.evaluations is not None
    run = partial(_evaluate, pipe, work) if some else generate
    return Contestant(run, pipe.preset, pipe.weights_hash, device)


def open_pipe(
    model: str | Path, ours: Ours, *, side: int | None = None, device: str = "cpu"
) -> HCMAPipeline:
    """The pipeline; a compiled backend's engines come from the cache, see :func:`build_missing`.

    Raises:
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
    """
    from hcma_fast.export.backends.eager import EagerEngine
    from hcma_fast.runtime.arguments import check_device
    from hcma_fast.runtime.gradient import gradient_engine
    from hcma_fast.runtime.pipeline import HCMAPipeline

    check_device(device, ours.backend)
    target = ours.target(side, device)
    pipe = None
    if target is not None:
        pipe = HCMAPipeline.from_engines(_folder(model, target), device=device)
    if pipe is None or ours.graphs is not None or ours.grad_backend is not None:
        parts = components_of(model, device)
        specs, graphs = parts.specs(side, side), parts.graphs(side, side)
        engines = {name: EagerEngine(module, specs[name]) for name, module in graphs.items()}
        given = {} if pipe is None else dict(pipe.engines)
        if ours.graphs is not None:
            given = {name: given[name] for name in ours.graphs}
        engines |= given  # type: ignore[arg-type]
        if ours.grad_backend is not None:
            engines["align"] = gradient_engine(  # type: ignore[assignment]
                ours.grad_backend, parts, specs["align"], device
            )
        pipe = HCMAPipeline(
            engines,
            parts.tokenizer,
            parts.info,
            backend=ours.backend,
            weights_hash=parts.weights_hash,
            device=device,
        )
        pipe.grad_backend = ours.grad_backend
    if ours.cuda_graphs:
        pipe.enable_cuda_graphs(ours.cuda_graphs)
    return pipe


def open_graph(model: str | Path, ours: Ours, name: GraphName, device: str = "cpu") -> Engine:
    """One graph of what :func:`open_pipe` opens.

    Raises:
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
    """
    from hcma_fast.export.backends.eager import EagerEngine
    from hcma_fast.export.open import open_engine
    from hcma_fast.models.checkpoint.folder import load_components
    from hcma_fast.models.checkpoint.random_sd14 import RandomSD14
    from hcma_fast.runtime.arguments import check_device

    check_device(device, ours.backend)
    target = ours.target(None, device)
    if target is not None:
        return open_engine(_folder(model, target), name, device)
    source = RandomSD14() if model == SD14 else load_components(model)
    return EagerEngine(source.graph(name).to(device), source.specs()[name])


def _evaluate(pipe: HCMAPipeline, work: Work) -> NDArray[np.float32]:
    """The first evaluations of a run, as ``plain_generate`` makes them."""
    import torch

    from hcma_fast.runtime.arguments import noise_from_seeds
    from hcma_fast.sampling.conditioning import condition
    from hcma_fast.sampling.loop import sample
    from hcma_fast.sampling.schedule import Schedule

    settings = pipe.settings
    if work.eta0 is not None:
        settings = settings.model_copy(update={"eta0": work.eta0})
    whole = Schedule.of(work.steps, settings)
    table = whole.table.first(work.evaluations)
    if int(table.step_index[-1]) >= whole.grounded_steps:
        raise UsageError(
            "the grounding gate closes before the last of these evaluations",
            value=work.evaluations,
            remedy="Use fewer.",
        )
    # of the steps that are left, all
    schedule = replace(whole, table=table, etas=whole.etas[: work.evaluations], grounding_beta=1.0)
    shape = tuple(int(size) for size in pipe.engines["align"].spec.inputs[0].shape[1:])
    with torch.no_grad():
        given = condition(
            pipe.engines,
            pipe.tokenizer,
            [PROMPT] * work.batch,
            [""] * work.batch,
            [work.layout] * work.batch,
            pipe.device,
        )
        run = pipe.replay or partial(sample, pipe.engines)
        z, _ = run(noise_from_seeds(work.seeds, shape).to(pipe.device), given, schedule)
    found: NDArray[np.float32] = z.cpu().numpy()
    return found


EVERY_PART = ("text", "unet", "vae", "aligner")


def components_of(
    model: str | Path, device: str = "cpu", drawn: Sequence[str] = EVERY_PART
) -> Components:
    """All parts in memory, on ``device``; of sd14 only those that are ``drawn`` have weights.

    Raises:
        WeightsError: as in ``load_components``.
    """
    from hcma_fast.models.checkpoint.folder import load_components
    from hcma_fast.models.checkpoint.random_sd14 import RandomSD14

    parts = RandomSD14().drawn(*drawn) if model == SD14 else load_components(model)
    modules = (parts.text_encoder, parts.unet, parts.vae, parts.own_aligner)
    for module in (one for one in modules if not next(one.parameters()).is_meta):
        module.to(device)
    return parts


def weights_hash_of(model: str | Path) -> tuple[str, str]:
    """Preset and hash of the weights, which are not loaded.

    Raises:
        WeightsError: no such model.
    """
    from hcma_fast.models.checkpoint.folder import locate
    from hcma_fast.models.checkpoint.info import read_info
    from hcma_fast.models.checkpoint.random_sd14 import RandomSD14

    if model == SD14:
        return SD14, RandomSD14().weights_hash
    checkpoint = locate(model)
    info = read_info(checkpoint.folder)
    return info.preset if info else SD14, checkpoint.weights_hash


def _folder(model: str | Path, target: Target) -> VerifiedFolder:
    """The engine folder in the cache, opened; built where it is missing."""
    from hcma_fast.export.cache import engine_folder, find_or_build
    from hcma_fast.models.checkpoint.folder import locate
    from hcma_fast.models.checkpoint.random_sd14 import RandomSD14

    if model != SD14:
        return engine_folder(locate(model), target)
    source = RandomSD14()
    return find_or_build(source.weights_hash, lambda: source, target)


def build_missing(
    model: str | Path,
    ours: Ours,
    side: int | None,
    say: Callable[[str], None],
    *,
    device: str = "cpu",
) -> None:
    """Build engines that are not in the cache, in a process of their own.

    The process that is timed must not be one that exported and validated.

    Raises:
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
    """
    targets = [ours.target(side, device) if ours.backend in BACKENDS else None]
    targets += [Ours("onnxruntime").target(None)] if ours.grad_backend == "onnx" else []
    for target in targets:
        if target is None:
            continue
        from hcma_fast.export.cache import cached_engine

        if cached_engine(weights_hash_of(model)[1], target) is None:
            say(f"build {target.backend}")
            with worker(f"the build for {target.backend}", partial(_build, model, target)):
                pass


def _build(model: str | Path, target: Target) -> Contestant:
    _folder(model, target)
    return Contestant(lambda: np.zeros(1, np.float32), *weights_hash_of(model))
