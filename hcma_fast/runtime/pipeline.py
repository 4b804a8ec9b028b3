"""HCMAPipeline: prompts and layouts in, images out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from hcma_fast.config import AlignmentSettings, Sampler, SettingsChange, check_backend, devices_of
from hcma_fast.engine import Engine
from hcma_fast.errors import LOWER_STEP, BackendError, DivergenceError, UsageError
from hcma_fast.export.backends.eager import eager_engines
from hcma_fast.export.precision import Precision, check_precision
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
from hcma_fast.runtime.arguments import (
    Seeds,
    check_callback,
    check_device,
    check_latents,
    check_names,
    next_latents,
    spread_requests,
)
from hcma_fast.runtime.engine_room import EngineRoom, ends_step
from hcma_fast.runtime.output import HCMAOutput
from hcma_fast.sampling.capture import CaptureMode, check_capturable
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import EXACT, Savings
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
        #: as asked for, or chosen for "auto"; None: the backend's default, or the engine folder's
        self.precision: str | None = None
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
            precision: float32, float16 or bfloat16; default float32 where the backend has it, or
                what "auto" chooses.
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

            choice = choose_backend(device, precision)
            backend, precision, device = choice.backend, choice.precision, choice.device
            _log.info("Backend %s: %s.", choice.label, choice.why)
        if grad_backend is not None:
            from hcma_fast.runtime.gradient import check_grad_backend, gradient_engine

            check_grad_backend(grad_backend, device or devices_of(backend or "eager")[0])
        folded = tuple(Lora.parse(lora) for lora in loras)
        options = ModelOptions(gligen, vae, clip_skip, folded)
        checkpoint = locate(name_or_path, aligner=aligner, options=options)
        if backend in (None, "eager"):
            device = device or "cpu"
            check_device(device, "eager")
            kind = check_precision(precision)
            pipe = cls.from_components(load_components(checkpoint), device=device, precision=kind)
        else:
            from hcma_fast.export.cache import engine_folder
            from hcma_fast.export.target import Target, default_precision, device_for

            where = device or devices_of(backend)[0]
            check_device(where, backend)
            rounded = cast(Precision, precision or default_precision(backend))
            target = Target(backend, rounded, device=device_for(backend, where))
            engine = engine_folder(checkpoint, target, progress=progress)
            pipe = cls.from_engines(engine, device=where)
        pipe.precision = precision
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
    def from_components(
        cls, components: Components, *, device: str = "cpu", precision: Precision = "float32"
    ) -> HCMAPipeline:
        """The eager pipeline, in float32 the reference; moves the modules to ``device``."""
        return cls(
            eager_engines(components.graphs(), components.specs(), device, precision),
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
        sampler: Sampler = "plms",
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
            sampler: the solver: plms is the paper's.
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
        check_callback(callback_on_step_end)
        settings = SettingsChange.of(
            guidance_scale=guidance_scale,
            grounding_beta=grounding_beta,
            eta0=eta0,
            lambda_global=lambda_global,
            lambda_local=lambda_local,
            window=align_window,
        )
        requests = spread_requests(
            prompt,
            layout,
            negative_prompt,
            seed if latents is None else 0,
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            settings=settings,
            savings=savings,
        )
        batch = len(requests)
        room = self.engine_room()
        schedule = room.schedule(requests[0])
        room.check_batch(batch, schedule.guided_steps == schedule.steps)
        noise = None if latents is None else check_latents(latents, (batch, *room.latent_shape))
        room.hint(requests)

        def on_evaluation(k: int, z: Tensor) -> Tensor:
            if callback_on_step_end is None or not ends_step(schedule, k):
                return z
            step = int(schedule.table.step_index[k])
            time = int(schedule.table.timesteps[0 if step == 0 else k])
            return next_latents(callback_on_step_end(self, step, time, {"latents": z}), z)

        watch = on_evaluation if callback_on_step_end else None
        z, losses = room.sample(requests, [schedule] * batch, noise, watch)
        if not bool(z.isfinite().all()):
            raise DivergenceError(
                "the latent diverged",
                value=settings.over(self.settings).model_dump(),
                remedy=LOWER_STEP,
            )
        images = z if output_type == "latent" else pixels.as_type(self.decode(z), output_type)
        seeds = [] if latents is not None else [request.seed for request in requests]
        return HCMAOutput(images, losses, seeds, z)

    def engine_room(self, *, cached: bool = False) -> EngineRoom:
        """What runs requests on these engines; ``cached``: see :class:`.EngineRoom`."""
        return EngineRoom(
            self.engines, self.tokenizer, self.info, self.device, replay=self.replay, cached=cached
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
