"""The methods that `hcma-fast eval` compares, by name, all in the same sampler."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.methods.attend_and_excite import AttendAndExcite
from hcma_fast.bench.quality.methods.attention import AttentionUNet, choose_factor
from hcma_fast.bench.quality.methods.boxdiff import BoxDiff
from hcma_fast.bench.quality.methods.guidance import GuidanceEngine, Guide
from hcma_fast.bench.quality.methods.layout_guidance import LayoutGuidance
from hcma_fast.bench.quality.methods.targets import Target, find_targets
from hcma_fast.config import AlignmentSettings, SettingsChange
from hcma_fast.engine import Engine
from hcma_fast.errors import InputError, UsageError
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.generator import BatchGenerator
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.runtime.request import Request
from hcma_fast.specs import GRAPH_NAMES, GraphName

#: without the gated layers, on the caption alone: Stable Diffusion
_UNGROUNDED = {"grounding_beta": 0.0, "eta0": 0.0}
_GUIDED: dict[str, Any] = {
    "attend-and-excite": AttendAndExcite,
    "boxdiff": BoxDiff,
    "layout-guidance": lambda targets, _: LayoutGuidance(targets),
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "sd": _UNGROUNDED,
    "gligen": {"eta0": 0.0},
    # a rate above 0 in a window of all steps makes the sampler call `align` at each, whatever the
    # checkpoint has: which steps count, how far they go and what is weighed are the peer's own
    **{
        name: {**_UNGROUNDED, "eta0": 1.0, "window": (0.0, 1.0), "lambda_global": 1.0}
        for name in _GUIDED
    },
    "hcma": {},
    "hcma-global": {"lambda_local": 0.0},
    "hcma-local": {"lambda_global": 0.0},
}
METHOD_NAMES: tuple[str, ...] = tuple(_SETTINGS)
_OVERRIDABLE = tuple(
    name for name, field in AlignmentSettings.model_fields.items() if field.annotation is float
)


@dataclass(frozen=True)
class Method:
    """A row of the table. Make one by :meth:`parse`."""

    label: str
    """what the user wrote: the name, and settings after a colon"""
    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    """of the checkpoint's AlignmentSettings"""

    @classmethod
    def parse(cls, text: str) -> Method:
        """From "hcma" or "hcma:eta0=10,guidance_scale=5".

        Raises:
            UsageError: an unknown name or setting, or a value out of range.
        """
        name, _, rest = text.partition(":")
        if name not in _SETTINGS:
            raise UsageError(
                "unknown method", value=name, remedy=f"Methods: {', '.join(METHOD_NAMES)}."
            )
        given: dict[str, float] = {}
        for part in rest.split(",") if rest else ():
            key, equals, value = part.partition("=")
            number = re.fullmatch(r"[0-9]+(\.[0-9]+)?", value)
            if not equals or key not in _OVERRIDABLE or number is None or key in given:
                raise UsageError(
                    "a method's settings read NAME:KEY=NUMBER,KEY=NUMBER",
                    value=text,
                    remedy=f"Keys: {', '.join(_OVERRIDABLE)}.",
                )
            given[key] = float(value)
        if fixed := sorted(set(given) & set(_SETTINGS[name])):
            raise UsageError(
                f"{name} is what it is by its {', '.join(fixed)}",
                value=text,
                remedy="Leave it out, or use another method.",
            )
        method = cls(text, name, {**_SETTINGS[name], **given})
        method.settings(AlignmentSettings())
        return method

    @property
    def folder(self) -> str:
        """Name of its folder in a run."""
        return self.label.replace(":", "-").replace(",", "-")

    @property
    def guided(self) -> bool:
        """Does it move the latent by cross-attention? Then it needs the caption to name boxes."""
        return self.name in _GUIDED

    @property
    def grounded(self) -> bool:
        """Does it give the boxes to the model?"""
        return "grounding_beta" not in _SETTINGS[self.name]

    def settings(self, defaults: AlignmentSettings) -> AlignmentSettings:
        """What it sets on top of the checkpoint's own.

        Raises:
            UsageError: a value is out of range.
        """
        return SettingsChange(**self.overrides).over(defaults)

    def check(
        self, items: Sequence[EvalItem], tokenizer: CLIPTokenizer, defaults: AlignmentSettings
    ) -> None:
        """Refuse what would fail, or mean nothing, before the first image is made.

        Raises:
            UsageError: HCMA with a checkpoint whose alignment is off.
            InputError: a caption does not name what its layout has.
        """
        if self.name.startswith("hcma") and self.settings(defaults).eta0 == 0:
            raise UsageError(
                f"{self.label} is gligen: the checkpoint's eta0 is 0",
                value=0.0,
                remedy=f"Say a rate, such as {self.name}:eta0=1.",
            )
        if self.guided:
            for item in items:
                self.targets(item, tokenizer)

    def targets(self, item: EvalItem, tokenizer: CLIPTokenizer) -> tuple[Target, ...]:
        """The tokens that it guides for one image.

        Raises:
            InputError: see :func:`find_targets`; the image's id is in front.
        """
        try:
            return find_targets(tokenizer, item.prompt, item.layout, item.mentions)
        except InputError as error:
            raise InputError(
                f"{self.label}, image {item.id}: {error.what}",
                value=error.value,
                remedy=error.remedy,
            ) from error


@dataclass(frozen=True)
class Generated:
    """A batch of images and what they cost."""

    images: list[NDArray[np.uint8]]
    """(H, W, 3) each"""
    losses: list[list[float | None]]
    """per image a value per step: the alignment's sum or the peer's loss; None where it had none"""
    seconds: float
    """of the whole batch"""
    unet_forward: float
    """extra passes through the UNet, per image, beyond those of the sampler"""
    unet_backward: float
    aligner_passes: int
    """forward and backward passes through the aligner, per image"""


class Runner:
    """Generates by any method, on one loaded model."""

    def __init__(
        self,
        pipe: HCMAPipeline,
        load: Callable[[], Components],
        *,
        attention_factor: int | None = None,
    ) -> None:
        """``load`` gives the torch modules; only methods that guide by attention need them."""
        self.pipe, self._load, self._wanted = pipe, load, attention_factor
        self._unet: AttentionUNet | None = None
        self._factor = 0

    def attention(self) -> tuple[AttentionUNet, int]:
        """The UNet that gives its maps, and the resolution to use.

        Raises:
            UsageError: the UNet has no attention at the resolution asked for.
        """
        if self._unet is None:
            unet = (self.pipe.components or self._load()).unet
            self._factor = choose_factor(unet, self._wanted)
            self._unet = AttentionUNet(unet)
            self._unet.plain.to(self.pipe.device)
        return self._unet, self._factor

    def generate(
        self, method: Method, items: Sequence[EvalItem], steps: int, seeds: Sequence[int]
    ) -> Generated:
        """One image per item.

        Raises:
            UsageError: the latent diverged. InputError: see :meth:`Method.check`.
            DeviceMemoryError: the batch is too large.
        """
        settings = method.settings(self.pipe.settings)
        # the six graphs only: fused ones have no place where a peer could stand in for `align`
        engines: dict[GraphName, Engine] = {
            name: self.pipe.engines[name] for name in GRAPH_NAMES if name in self.pipe.engines
        }
        unet = None
        if method.guided:
            unet, factor = self.attention()
            unet.passes.forward = unet.passes.backward = 0
            guides: list[Guide | None] = []
            for item in items:
                targets = method.targets(item, self.pipe.tokenizer)
                guides.append(_GUIDED[method.name](targets, factor) if targets else None)
            engines["align"] = GuidanceEngine(engines["align"].spec, unet, guides, steps)
        pipe = HCMAPipeline(
            engines,
            self.pipe.tokenizer,
            self.pipe.info,
            backend=self.pipe.backend,
            weights_hash=self.pipe.weights_hash,
            engine_hash=self.pipe.engine_hash,
            components=self.pipe.components,
            device=self.pipe.device,
        )
        start = time.perf_counter()
        results = BatchGenerator(pipe, max_batch=len(items), cached=False).run(
            [
                Request(
                    item.prompt,
                    item.layout if method.grounded else Layout.empty(),
                    seed=seed,
                    negative_prompt=item.negative_prompt,
                    num_inference_steps=steps,
                    settings=settings,
                )
                for item, seed in zip(items, seeds, strict=True)
            ]
        )
        images = [np.asarray(result.image) for result in results]
        seconds = time.perf_counter() - start
        losses: list[list[float | None]] = []
        for result, item in zip(results, items, strict=True):
            totals = []
            for entry in result.losses:
                total = float(entry.loss_global) * settings.lambda_global
                if not method.guided and len(item.layout):
                    local = float(entry.loss_local[: len(item.layout)].mean())
                    total += settings.lambda_local * local
                totals.append(None if math.isnan(total) else total)
            losses.append(totals)
        passes = unet.passes if unet is not None else None
        return Generated(
            images,
            losses,
            seconds,
            unet_forward=passes.forward / len(items) if passes else 0,
            unet_backward=passes.backward / len(items) if passes else 0,
            aligner_passes=0 if method.guided else len(results[0].losses),
        )
