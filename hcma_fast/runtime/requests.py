"""What a user asks for, checked and spread to one prompt, layout and seed per image."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hcma_fast.config import AlignmentSettings, devices_of
from hcma_fast.errors import BackendError, InputError, UsageError
from hcma_fast.layout import Layout


def pair_prompts(
    prompt: str | Sequence[str], layout: Layout | Sequence[Layout] | None
) -> tuple[list[str], list[Layout]]:
    """Prompts and layouts of equal count: a single one of either serves all of the other.

    Raises:
        InputError: nothing given, a layout is none, or the counts do not match.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    given = Layout.empty() if layout is None else layout
    layouts = [given] if isinstance(given, Layout) else list(given)
    for item in layouts:
        check_layout(item)
    if not prompts or not layouts:
        raise InputError("there is no prompt or no layout", remedy="Give at least one of each.")
    if len(prompts) == 1:
        prompts *= len(layouts)
    if len(layouts) == 1:
        layouts *= len(prompts)
    if len(prompts) != len(layouts):
        raise InputError(
            f"{len(prompts)} prompts do not match {len(layouts)} layouts",
            remedy="Give one layout per prompt, or a single one of either.",
        )
    return prompts, layouts


def check_layout(layout: object) -> None:
    """Raises InputError for what is no layout."""
    if not isinstance(layout, Layout):
        raise InputError(
            "a layout must be a hcma_fast.Layout",
            value=layout,
            remedy='Write Layout(["dog"], [[0.1, 0.1, 0.5, 0.9]]).',
        )


def spread_negatives(texts: str | Sequence[str] | None, count: int) -> list[str]:
    """One negative prompt per image; None is the empty one.

    Raises:
        InputError: the counts do not match.
    """
    given = [texts or ""] if texts is None or isinstance(texts, str) else list(texts)
    spread = given * count if len(given) == 1 else given
    if len(spread) != count:
        raise InputError(
            f"{len(spread)} negative prompts do not match {count} images",
            remedy="Give one for all, or one per image.",
        )
    return spread


def spread_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per image: an integer counts up over the batch, None draws one first.

    Raises:
        InputError: the counts do not match, or a seed is not an integer in [0, 2**63).
    """
    first = secrets.randbelow(2**31) if seed is None else seed
    seeds = list(first) if isinstance(first, Sequence) else [first + i for i in range(count)]
    whole = all(type(value) is int and 0 <= value < 2**63 for value in seeds)
    if len(seeds) != count or not whole or isinstance(first, bool):
        wanted = "one seed" if count == 1 else f"{count} seeds"
        raise InputError(
            f"there must be {wanted}, whole numbers from 0 to 2**63 - 1",
            value=seed,
            remedy="Give one integer for the batch, or one per image.",
        )
    return seeds


def noise_from_seeds(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Unit-normal latents (B, *shape) float32, drawn on the host: the same on every device."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def check_latents(latents: Tensor, expected: tuple[int, ...]) -> Tensor:
    """``latents`` as float32.

    Raises:
        InputError: not a finite float tensor of the expected shape.
    """
    if not isinstance(latents, Tensor) or tuple(latents.shape) != expected:
        raise InputError(
            "latents have the wrong shape",
            value=tuple(latents.shape) if isinstance(latents, Tensor) else latents,
            remedy=f"Expected a tensor of shape {expected} for these prompts.",
        )
    if not latents.is_floating_point() or not bool(latents.isfinite().all()):
        raise InputError(
            "latents must be finite floating-point numbers",
            value=str(latents.dtype),
            remedy="Start from torch.randn.",
        )
    return latents.float()


def override_settings(defaults: AlignmentSettings, **overrides: Any) -> AlignmentSettings:
    """``defaults`` with every override that is not None.

    Raises:
        UsageError: a value is out of range or not finite.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        settings = AlignmentSettings(**{**defaults.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "window"
        raise UsageError(
            f"{name} is out of range: {first['msg']}",
            value=given.get(name),
            remedy="See hcma_fast.config.AlignmentSettings.",
        ) from error
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(
                f"{name} must be finite", value=value, remedy="Leave it out for the default."
            )
    return settings


def call_arguments(settings: AlignmentSettings) -> dict[str, Any]:
    """All of ``settings`` that a call of the pipeline takes, by its names there."""
    fields = settings.model_dump(exclude={"normalized", "window"})
    return {**fields, "align_window": settings.window}


def check_device(device: str, backend: str) -> None:
    """Whether torch has the device, and the backend runs on it.

    Raises:
        UsageError: no device of torch, or none of the backend's.
        BackendError: there is no such device here.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError("unknown device", value=device, remedy="Use cpu or cuda.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "torch finds no CUDA device",
            value=device,
            remedy="Use the device cpu; hcma-fast doctor says what torch was built for.",
        )
    runs_on = devices_of(backend)
    if kind not in runs_on:
        raise BackendError(
            f"the backend {backend} does not run on this device",
            value=device,
            remedy=f"Use the device {runs_on[0]}, or another backend.",
        )
