"""What else a user could run on the same weights: a loop of diffusers' with what is at hand.

torch.compile, straight exports of the UNet to ONNX Runtime and OpenVINO without our work on the
graphs, and diffusers' own GLIGEN pipeline, which has no alignment.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hcma_fast.bench.shared.machine import lacks_bfloat16
from hcma_fast.bench.speed.harness.contestants import (
    PROMPT,
    SD14,
    Work,
    components_of,
    plain_contestant,
)
from hcma_fast.bench.speed.harness.plan import Plan, openvino_rounds, side_by_side
from hcma_fast.bench.speed.harness.report import COMPILED
from hcma_fast.bench.speed.harness.rounds import HALF_ERROR, MAX_ERROR, Case, Group
from hcma_fast.bench.speed.harness.workers import Contestant
from hcma_fast.bench.speed.plain_and_ours import ours_case, plain_case
from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH
from hcma_fast.errors import UsageError

if TYPE_CHECKING:
    from hcma_fast.models.checkpoint.folder import Components

Exported = Literal["onnxruntime", "openvino", "openvino bfloat16"]
Half = Literal["float16", "bfloat16"]
_NAMES = ("sample", "timestep", "context", "boxes", "positive_embeddings", "masks")
Runner = Callable[[Mapping[str, NDArray[Any]]], NDArray[np.float32]]


def peers(plan: Plan) -> list[Group]:
    """The plain loop, its faster variants and our pipeline; then the same without alignment."""
    groups: list[Group] = []
    sizes = (1,) if plan.quick or plan.model == SD14 else (1, 8)
    for batch in sizes:
        work = plan.work(batch)
        slow = None if plan.on_gpu else lacks_bfloat16()
        half = half_case(plan, work)
        left_out = {half.name: slow} if slow else {}
        cases = [case for case in _aligned(plan, work, half) if case.name not in left_out]
        groups += side_by_side(plan, f"aligned, batch {batch}", cases, left_out)
    # the pipeline tells of its latents from the second evaluation on
    some = 2 if plan.model == SD14 else None
    work = replace(plan.work(), eta0=0.0, evaluations=some)
    load = partial(load_gligen, plan.model, work, plan.device)
    gligen = Case("diffusers' GLIGEN pipeline", load, work.labels, work.batch)
    cases = [plain_case(plan.model, work, plan.device), gligen]
    # the pipeline is in float32 here: ours too, where we have it
    exact = [ours for ours in plan.chosen if ours.precision == "float32"]
    cases += [ours_case(plan.model, ours, work, plan.device) for ours in exact[:1]]
    return groups + side_by_side(plan, "without alignment", cases)


def _aligned(plan: Plan, work: Work, half: Case) -> list[Case]:
    cases = [plain_case(plan.model, work, plan.device)]
    load: Callable[[], Contestant] = partial(load_compiled, plan.model, work, plan.device)
    cases.append(Case(COMPILED, load, work.labels, work.batch))
    cases.append(half)
    exported: tuple[Exported, ...] = ("onnxruntime", "openvino", "openvino bfloat16")
    some = exported if openvino_rounds(plan.device) else exported[:2]
    for runtime in () if plan.on_gpu else some:
        load = partial(load_exported, plan.model, work, runtime)
        most = HALF_ERROR if "bfloat16" in runtime else MAX_ERROR
        name = f"plain loop, UNet on {runtime}"
        cases.append(Case(name, load, work.labels, work.batch, most))
    return cases + [ours_case(plan.model, ours, work, plan.device) for ours in plan.deployed]


def half_case(plan: Plan, work: Work) -> Case:
    """The plain loop in half precision, as :func:`load_half`."""
    half: Half = "float16" if plan.on_gpu else "bfloat16"
    load = partial(load_half, plan.model, work, half, plan.device)
    return Case(f"plain loop in {half}", load, work.labels, work.batch, HALF_ERROR)


def load_compiled(model: str, work: Work, device: str = "cpu") -> Contestant:
    """The plain loop with torch.compile on the UNet and on the losses, and so on their gradient.

    Raises:
        WeightsError: as in ``load_components``.
    """
    parts = components_of(model, device)
    return plain_contestant(
        parts,
        work,
        device,
        unet=torch.compile(parts.unet),
        losses=torch.compile(parts.own_aligner.losses),
    )


def load_half(model: str, work: Work, precision: Half, device: str = "cpu") -> Contestant:
    """The plain loop with UNet and aligner in half precision; texts, latent and scheduler are not.

    Raises:
        WeightsError: as in ``load_components``.
    """
    parts, dtype = components_of(model, device), getattr(torch, precision)
    parts.unet.to(dtype)
    # the region map is computed once, as it is
    aligner = copy.deepcopy(parts.own_aligner).to(dtype)

    def unet(
        sample: Tensor, t: Tensor, context: Tensor, *, cross_attention_kwargs: dict[str, Any] | None
    ) -> SimpleNamespace:
        given = cross_attention_kwargs and {
            "gligen": {name: x.to(dtype) for name, x in cross_attention_kwargs["gligen"].items()}
        }
        found = parts.unet(
            sample.to(dtype), t, context.to(dtype), cross_attention_kwargs=given, return_dict=False
        )[0]
        return SimpleNamespace(sample=found.float())

    def losses(*given: Any) -> tuple[Tensor, Tensor]:
        halves = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in given]
        loss_global, per_box = aligner.losses(*halves)
        return loss_global.float(), per_box.float()

    return plain_contestant(parts, work, device, unet=unet, losses=losses)


def load_exported(model: str, work: Work, runtime: Exported) -> Contestant:
    """The plain loop with a UNet that torch.onnx.export wrote; the gradient stays torch's.

    Raises:
        WeightsError: as in ``load_components``.
        BackendError: the runtime is not installed.
        UsageError: the checkpoint's gate closes, which would take a second graph.
    """
    parts = components_of(model)
    if parts.settings.grounding_beta < 1:
        raise UsageError(
            "the exported UNet always looks at the boxes",
            value=f"grounding_beta {parts.settings.grounding_beta}",
            remedy="Leave this peer out, or use a checkpoint with grounding_beta 1.",
        )
    opener = _open_onnxruntime if runtime == "onnxruntime" else partial(_open_openvino, runtime)
    folder = Path(tempfile.mkdtemp(prefix="hcma-fast-peer-"))
    try:
        run = opener(_export(parts, 2 * work.batch, folder))
    finally:
        # opened, it is in memory or stays open: the names are not needed
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    # the weights are the runtime's now
    lean = replace(parts, unet=None)
    return plain_contestant(lean, work, unet=_Called(run), losses=parts.own_aligner.losses)


class _Denoiser(nn.Module):
    """diffusers' UNet with tensors for arguments."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        boxes: Tensor,
        positive_embeddings: Tensor,
        masks: Tensor,
    ) -> Tensor:
        gligen = {"boxes": boxes, "positive_embeddings": positive_embeddings, "masks": masks}
        found: Tensor = self.unet(
            sample,
            timestep,
            context,
            cross_attention_kwargs={"gligen": gligen},
            return_dict=False,
        )[0]
        return found


class _Called:
    """An exported UNet, called as the plain loop calls diffusers'."""

    def __init__(self, run: Runner) -> None:
        self._run = run

    def __call__(
        self, sample: Tensor, t: Tensor, context: Tensor, *, cross_attention_kwargs: dict[str, Any]
    ) -> SimpleNamespace:
        given = (sample, t.reshape(1), context, *cross_attention_kwargs["gligen"].values())
        feed = {name: value.numpy() for name, value in zip(_NAMES, given, strict=True)}
        return SimpleNamespace(sample=torch.from_numpy(self._run(feed)))


@torch.no_grad()
def _export(parts: Components, batch: int, folder: Path) -> Path:
    """As the documentation of torch.onnx.export has it, for one batch size."""
    side, width = parts.own_aligner.config.latent_size, parts.text_encoder.config.hidden_size
    example = (
        torch.randn(batch, 4, side, side),
        torch.tensor([1]),
        torch.randn(batch, TOKEN_LENGTH, width),
        torch.rand(batch, MAX_OBJECTS, 4),
        torch.randn(batch, MAX_OBJECTS, width),
        torch.ones(batch, MAX_OBJECTS),
    )
    path = folder / "unet.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Denoiser(parts.unet),
            example,
            dynamo=True,
            input_names=list(_NAMES),
            output_names=["noise"],
            verbose=False,
        )
    assert program is not None, "torch.onnx.export(dynamo=True) returns a program"
    program.save(str(path), external_data=True)
    return path


def _open_onnxruntime(path: Path) -> Runner:
    from hcma_fast.export.backends.onnxruntime.session import onnxruntime_version

    onnxruntime_version()  # says it in our words if it is missing
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(None, dict(feed))[0]
        return found

    return run


def _open_openvino(runtime: Exported, path: Path) -> Runner:
    from hcma_fast.export.backends.openvino.model import shared_core

    hint = "bf16" if "bfloat16" in runtime else "f32"
    options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    compiled = shared_core().compile_model(str(path), "CPU", options)

    def run(feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = compiled(dict(feed))[0]
        return found

    return run


class _Enough(Exception):
    """Ends the pipeline, which has no other way out, after some evaluations."""


def load_gligen(model: str, work: Work, device: str = "cpu") -> Contestant:
    """diffusers' own pipeline for GLIGEN; deprecated there, and without alignment.

    Raises:
        WeightsError: as in ``load_components``.
    """
    from diffusers import StableDiffusionGLIGENPipeline

    from hcma_fast.bench.speed.harness.plain_loop import draw_noise, pndm_scheduler

    parts = components_of(model, device)
    # the pipeline pads to it, and tokenizers that are made here do not say
    parts.tokenizer.model_max_length = TOKEN_LENGTH
    pipe = StableDiffusionGLIGENPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=pndm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    side = parts.own_aligner.config.latent_size
    last: list[Tensor] = []

    def watch(step: int, timestep: Tensor, latents: Tensor) -> None:
        last[:] = [latents]
        if work.evaluations is not None and step + 1 >= work.evaluations:
            raise _Enough

    def generate() -> NDArray[np.float32]:
        with suppress(_Enough):
            pipe(
                [PROMPT] * work.batch,
                num_inference_steps=work.steps,
                guidance_scale=parts.settings.guidance_scale,
                gligen_scheduled_sampling_beta=parts.settings.grounding_beta,
                gligen_phrases=list(work.layout.phrases),
                gligen_boxes=[list(box) for box in work.layout.boxes],
                latents=draw_noise(work.seeds, side).to(device),
                callback=watch,
            )
        found: NDArray[np.float32] = last[0].cpu().numpy()
        return found

    return Contestant(generate, parts.preset, parts.weights_hash, device)
