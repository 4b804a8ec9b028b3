"""HCMAPipeline: prompts and layouts in, images out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from hcma_fast.config import AlignmentSettings, check_backend, devices_of
from hcma_fast.engine import Engine
from hcma_fast.errors import BackendError, DivergenceError, InputError, UsageError
from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import (
    Checkpoint,
    CheckpointInfo,
    Components,
    load_components,
    locate,
)
from hcma_fast.models.checkpoint.options import Lora, ModelOptions
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer
from hcma_fast.runtime import images as pixels
from hcma_fast.runtime.abilities import check_abilities
from hcma_fast.runtime.hints import give_hints
from hcma_fast.runtime.output import HCMAOutput
from hcma_fast.runtime.requests import (
    Seeds,
    check_callback,
    check_device,
    check_latents,
    check_names,
    next_latents,
    noise_from_seeds,
    override_settings,
    pair_prompts,
    spread_negatives,
    spread_seeds,
)
from hcma_fast.sampling.capture import CaptureMode, check_capturable
from hcma_fast.sampling.conditioning import condition
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import EXACT, Savings, check_savings
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import BatchRange, GraphName
from hcma_fast.torch_state import neutral_torch

if TYPE_CHECKING:
    from hcma_fast.export.manifest import VerifiedFolder

_log = logging.getLogger("hcma_fast")
StepCallback = Callable[["HCMAPipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]
ENGINE_MANIFEST = "manifest.json"
"""The file that makes a folder an engine folder."""


class HCMAPipeline:
    """Grounded text-to-image generation over six engines. Make one by :meth:`from_pretrained`."""

    def __init__(
        self,
        engines: Mapping[GraphName, Engine],
        tokenizer: CLIPTokenizer,
        info: CheckpointInfo,
        *,
        backend: str,
        weights_hash: str,
        engine_hash: str | None = None,
        components: Components | None = None,
        device: str = "cpu",
    ) -> None:
        self.engines = engines
        self.tokenizer = tokenizer
        self.info = info
        self.backend = backend
        self.weights_hash = weights_hash
        self.engine_hash = engine_hash
        #: torch modules; None for compiled engines, which need no weights beside them
        self.components = components
        self.device = device
        #: what computes the alignment gradient, if that is not the backend
        self.grad_backend: str | None = None
        #: what samples in place of the plain loop, see :meth:`enable_cuda_graphs`
        self.replay: ReplaySampler | None = None

    def enable_cuda_graphs(self, mode: CaptureMode = "step") -> None:
        """Capture the sampler's evaluations at first use of a batch size, and replay them.

        Off until it is called: it was developed without a GPU. Call it again to drop the graphs.

        Args:
            mode: "step" replays once per evaluation; "trajectory" holds all of them in one graph,
                which takes no ``callback_on_step_end``.

        Raises:
            UsageError: another mode, or not on a GPU.
            BackendError: what computes the graphs cannot be captured.
        """
        check_capturable(mode, self.device, self.backend, self.grad_backend, self.engines)
        self.replay = ReplaySampler(self.engines, self.device, mode=mode)

    @property
    def preset(self) -> str:
        """Name of the preset that the weights belong to."""
        return self.info.preset

    @property
    def settings(self) -> AlignmentSettings:
        """The checkpoint's defaults of eta0, lambdas, window, grounding_beta and guidance_scale."""
        return self.info.alignment

    @property
    def image_size(self) -> int:
        """Side of the square images that the model was trained on, in pixels."""
        return self.info.image_size

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images that come out, in pixels."""
        height, width = self.engines["vae_decoder"].spec.outputs[0].shape[2:]
        return int(height), int(width)

    @property
    def batch_range(self) -> BatchRange:
        """Images that it can make at once."""
        return self.engines["vae_decoder"].spec.batch

    @classmethod
    @neutral_torch()
    def from_pretrained(
        cls,
        name_or_path: str | Path | Checkpoint = "tiny",
        *,
        backend: str | None = None,
        precision: str | None = None,
        device: str | None = None,
        aligner: str | Path | None = None,
        gligen: str | Path | None = None,
        vae: str | Path | None = None,
        clip_skip: int | None = None,
        loras: Sequence[Lora | str | Path] = (),
        grad_backend: str | None = None,
        verify_key: str | Path | None = None,
        progress: Callable[[str, str], None] | None = None,
    ) -> HCMAPipeline:
        """Load a preset, a folder, a single file, a hub id (with ``@revision``), an engine folder,
        or what ``locate`` returned.

        Args:
            backend: one of ``config.BACKENDS``, or "auto" for the best that is installed; default
                eager, or the engine folder's own. A compiled one is built into the cache at first.
            precision: float32, float16 or bfloat16, of a compiled backend; default float32
                where the backend has it.
            device: where it runs, such as "cpu" or "cuda"; default the backend's own.
            aligner: folder of the aligner, for a checkpoint that has none.
            gligen, vae, clip_skip: see ``models.checkpoint.options.ModelOptions``.
            loras: files, ``FILE:SCALE`` or ``Lora(file, scale)``, folded into the weights.
            grad_backend: one of ``config.GRAD_BACKENDS``, to compute the alignment gradient in
                place of ``backend``; see ``runtime.gradient``.
            verify_key: file of the ed25519 public key that must have signed the engine folder.
            progress: called with (graph, stage) while engines are built.

        Raises:
            WeightsError, BackendError, EngineError, UsageError.
        """
        check_names(name_or_path, aligner, backend, precision, device, grad_backend)
        if backend is not None:
            check_backend(backend, "auto")
        place = None if isinstance(name_or_path, Checkpoint) else Path(name_or_path)
        if place is not None and (place / ENGINE_MANIFEST).is_file():
            fixed = {
                **{"aligner": aligner, "precision": precision, "grad_backend": grad_backend},
                **{"gligen": gligen, "vae": vae, "clip_skip": clip_skip, "loras": loras or None},
            }
            if given := [name for name, value in fixed.items() if value is not None]:
                raise UsageError(
                    "an engine folder has its parts inside, its gradient and its precision",
                    value=given[0],
                    remedy=f"Leave out {' and '.join(given)}, or load the checkpoint instead.",
                )
            chosen = None if backend == "auto" else backend
            return cls.from_engines(place, backend=chosen, device=device, verify_key=verify_key)
        if verify_key is not None:
            raise UsageError(
                "only engine folders are signed, and this is none",
                value=str(name_or_path),
                remedy="Leave out the key, or name an engine folder as the model.",
            )
        if backend == "auto":
            from hcma_fast.export.open import choose_backend

            backend, why = choose_backend(device, precision)
            _log.info("Backend %s: %s.", backend, why)
        if grad_backend is not None:
            from hcma_fast.runtime.gradient import check_grad_backend, gradient_engine

            check_grad_backend(grad_backend, device or devices_of(backend or "eager")[0])
        folded = tuple(Lora.parse(lora) for lora in loras)
        options = ModelOptions(gligen, vae, clip_skip, folded)
        checkpoint = locate(name_or_path, aligner=aligner, options=options)
        if backend in (None, "eager"):
            if precision not in (None, "float32"):
                raise UsageError(
                    "eager computes in float32 only",
                    value=precision,
                    remedy="Use a compiled backend.",
                )
            device = device or "cpu"
            check_device(device, "eager")
            pipe = cls.from_components(load_components(checkpoint), device=device)
        else:
            from hcma_fast.export.cache import engine_folder
            from hcma_fast.export.precision import Precision
            from hcma_fast.export.target import Target, default_precision, device_for

            where = device or devices_of(backend)[0]
            check_device(where, backend)
            rounded = cast(Precision, precision or default_precision(backend))
            target = Target(backend, rounded, device=device_for(backend, where))
            engine = engine_folder(checkpoint, target, progress=progress)
            pipe = cls.from_engines(engine, device=where)
        if grad_backend is not None:
            if "align" not in pipe.engines:
                raise UsageError(
                    "this model has no aligner, so there is no gradient to compute",
                    value=grad_backend,
                    remedy="Leave the gradient's backend out, or give an aligner.",
                )
            parts, spec = pipe.components or load_components(checkpoint), pipe.engines["align"].spec
            align = gradient_engine(grad_backend, parts, spec, pipe.device)
            pipe.engines, pipe.grad_backend = {**pipe.engines, "align": align}, grad_backend
        return pipe

    @classmethod
    @neutral_torch()
    def from_components(cls, components: Components, *, device: str = "cpu") -> HCMAPipeline:
        """The eager reference pipeline; moves the components' modules to ``device``."""
        specs = components.specs()
        engines = {
            name: EagerEngine(module.to(device), specs[name])
            for name, module in components.graphs().items()
        }
        return cls(
            engines,
            components.tokenizer,
            components.info,
            backend="eager",
            weights_hash=components.weights_hash,
            components=components,
            device=device,
        )

    @classmethod
    @neutral_torch()
    def from_engines(
        cls,
        engine: Path | VerifiedFolder,
        *,
        backend: str | None = None,
        device: str | None = None,
        verify_key: str | Path | None = None,
    ) -> HCMAPipeline:
        """Open an engine folder, which may be removed or replaced afterwards.

        Args:
            verify_key: see :meth:`from_pretrained`.

        Raises:
            EngineError: it is incomplete, of another version or machine, was tampered with, or is
                not signed by the key.
            InputError, UsageError: the key cannot be read.
            BackendError: it was built for another backend, or does not run on ``device``.
        """
        from hcma_fast.export.manifest import open_folder
        from hcma_fast.export.open import open_engines
        from hcma_fast.export.signing import verify

        key = Path(verify_key) if verify_key is not None else None
        opened = open_folder(engine, key) if isinstance(engine, Path) else engine
        manifest = opened.manifest
        if key is not None and not isinstance(engine, Path):
            verify(key, manifest.engine_hash, manifest.signature, str(opened.path))
        if backend not in (None, manifest.backend):
            raise BackendError(
                f"this engine folder was built for {manifest.backend}",
                value=backend,
                remedy=f"Leave it out, or build again: hcma-fast build --backend {backend}.",
            )
        device = device or manifest.device
        check_device(device, manifest.backend)
        with opened.part("tokenizer") as texts:
            tokenizer = load_tokenizer(texts)
        return cls(
            open_engines(opened, device),
            tokenizer,
            manifest.info,
            backend=manifest.backend,
            weights_hash=manifest.weights_hash,
            engine_hash=manifest.engine_hash,
            device=device,
        )

    @neutral_torch()
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        layout: Layout | Sequence[Layout] | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        grounding_beta: float | None = None,
        eta0: float | None = None,
        lambda_global: float | None = None,
        lambda_local: float | None = None,
        align_window: tuple[float, float] | None = None,
        savings: Savings = EXACT,
        seed: Seeds = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: pixels.OutputType = "pil",
    ) -> HCMAOutput:
        """Generate one image per prompt and layout; a single one of either serves all of the other.

        Args:
            layout: None is a layout without boxes.
            guidance_scale: weight of classifier-free guidance; 1 switches it off. This,
                grounding_beta, eta0, the lambdas and the window default to the checkpoint's own.
            eta0: rate of the alignment (Eq. 8); 0 switches it off.
            savings: what to leave out in order to be faster; by default what changes no image.
            seed: one for the batch (image i uses seed + i), or one per image. An image depends
                on its own prompt, layout and seed only, never on its batch.
            latents: (B, 4, h, w) unit-normal noise to start from, instead of seeds.
            callback_on_step_end: called as in diffusers, with (pipeline, step, timestep,
                {"latents": z}), after each PLMS step; may return {"latents": z} to go on with.

        Raises:
            InputError: counts do not match, a text is too long, latents have a wrong shape.
            UsageError: a setting is out of range, or the callback returned what does not fit.
            DivergenceError: the settings made the latent diverge, or an image is not finite.
        """
        pixels.check_output_type(output_type)
        check_savings(savings)
        check_callback(callback_on_step_end)
        settings = override_settings(
            self.settings,
            guidance_scale=guidance_scale,
            grounding_beta=grounding_beta,
            eta0=eta0,
            lambda_global=lambda_global,
            lambda_local=lambda_local,
            window=align_window,
        )
        prompts, layouts = pair_prompts(prompt, layout)
        for one in layouts:
            check_abilities(self.engines, settings, savings, one)
        batch = len(prompts)
        negatives = spread_negatives(negative_prompt, batch)
        seeds = spread_seeds(seed, batch) if latents is None else []
        guided = settings.guidance_scale > 1
        schedule = Schedule.of(num_inference_steps, settings, savings)
        table = schedule.table
        self.check_batch(batch, schedule.guided_steps == schedule.steps)
        shape = tuple(int(size) for size in self.engines["vae_decoder"].spec.inputs[0].shape[1:])
        noise = (
            noise_from_seeds(seeds, shape)
            if latents is None
            else check_latents(latents, (batch, *shape))
        )
        give_hints(self.tokenizer, self.preset, prompts, layouts)
        conditioning = condition(
            self.engines,
            self.tokenizer,
            prompts,
            negatives if guided else None,
            layouts,
            self.device,
        )

        def on_evaluation(k: int, z: Tensor) -> Tensor:
            step, *later = table.step_index[k : k + 2].tolist()
            # the first of two evaluations of a step is not its end
            if callback_on_step_end is None or later[:1] == [step]:
                return z
            time = int(table.timesteps[0 if step == 0 else k])
            return next_latents(callback_on_step_end(self, step, time, {"latents": z}), z)

        run = self.replay or partial(sample, self.engines)
        watch = on_evaluation if callback_on_step_end else None
        z, losses = run(noise.to(self.device), conditioning, schedule, watch)
        if not bool(z.isfinite().all()):
            raise DivergenceError(
                "the latent diverged",
                value=settings.model_dump(),
                remedy="Lower eta0 or guidance_scale.",
            )
        images = z if output_type == "latent" else pixels.as_type(self.decode(z), output_type)
        return HCMAOutput(images, losses, seeds, z)

    def check_batch(self, batch: int, guided: bool) -> None:
        """Whether the engines take this many images at once, with guidance or without.

        Raises:
            InputError: too few or too many. UsageError: none without guidance.
        """
        images = self.batch_range
        if not images.min <= batch <= images.max:
            raise InputError(
                f"these engines were built for batches of {images}",
                value=batch,
                remedy="Generate as many images at once, or build for more with --batch.",
            )
        if images.static and not guided:
            raise UsageError(
                "engines of one batch size always compute both halves of the guidance",
                value=images.min,
                remedy="Use a guidance_scale above 1 to the end, or build with a range such as "
                "--batch 1:1:4.",
            )

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of clean scaled latents (B, 4, h, w), on the device.

        Raises:
            DivergenceError: an image has pixels that are not finite.
        """
        return pixels.require_finite(*self.decode_all(z))

    @neutral_torch()
    @torch.no_grad()
    def decode_all(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`decode` that does not raise: the images, and which of them are finite, (B,)."""
        return pixels.to_unit_range(self.engines["vae_decoder"]({"z": z})["image"])
