"""What a user asks for, checked and spread to one prompt, layout and seed per image."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsInt

import torch
from torch import Tensor

from hcma_fast.config import MAX_SEED, AlignmentSettings, devices_of
from hcma_fast.errors import BackendError, InputError, Remedy, UsageError, WeightsError
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.located import Checkpoint
from hcma_fast.scalars import plain, whole_number
from hcma_fast.seeds import seeded_generator

Seeds = SupportsInt | Sequence[SupportsInt] | None
"""One seed, also as a number, an array or a tensor of numpy and torch; or one per image"""


def pair_prompts(
    prompt: str | Sequence[str], layout: Layout | Sequence[Layout] | None
) -> tuple[list[str], list[Layout]]:
    """Prompts and layouts of equal count: a single one of either serves all of the other.

    Raises:
        InputError: nothing given, a prompt or a layout is none, or the counts do not match.
    """
    prompts = _texts(prompt, "prompt")
    given = Layout.empty() if layout is None else layout
    layouts = [given] if isinstance(given, Layout) else list(_items(given, "layout", Layout))
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
    """Raises InputError for what is no layout, or was made without a check of its boxes."""
    if not isinstance(layout, Layout):
        raise InputError(
            "a layout must be a hcma_fast.Layout",
            value=layout,
            remedy='Write Layout(["dog"], [[0.1, 0.1, 0.5, 0.9]]).',
        )
    # pydantic's model_construct checks nothing
    Layout(layout.phrases, layout.boxes)


def _items(given: object, kind: str, item: type) -> Iterable[Any]:
    """``given`` as something to go through.

    Raises:
        InputError: it is one thing, and no list of things.
    """
    if not isinstance(given, Iterable) or isinstance(given, Mapping | bytes):
        raise InputError(
            f"a {kind} must be a {item.__name__} or a list of them",
            value=given,
            remedy=f"Give one {item.__name__}, or one per image.",
        )
    return given


def _texts(given: object, kind: str) -> list[str]:
    """Texts, none of which has been looked at but for its type."""
    texts = [given] if isinstance(given, str) else list(_items(given, kind, str))
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"a {kind} must be a string", value=text, remedy='Write "a dog".')
    return texts


def spread_negatives(texts: str | Sequence[str] | None, count: int) -> list[str]:
    """One negative prompt per image; None is the empty one.

    Raises:
        InputError: the counts do not match.
    """
    given = [""] if texts is None else _texts(texts, "negative prompt")
    spread = given * count if len(given) == 1 else given
    if len(spread) != count:
        raise InputError(
            f"{len(spread)} negative prompts do not match {count} images",
            remedy="Give one for all, or one per image.",
        )
    return spread


def spread_seeds(seed: Seeds, count: int) -> list[int]:
    """One seed per image: a single number counts up over the batch, None draws one first.

    Raises:
        InputError: the counts do not match, or a seed is not a whole number in [0, 2**64).
    """
    first = secrets.randbelow(2**31) if seed is None else plain(seed)
    tolist = getattr(first, "tolist", None)
    given = tolist() if callable(tolist) else first
    try:
        if isinstance(given, Sequence) and not isinstance(given, str | bytes):
            seeds = [whole_number(value) for value in given]
        else:
            start = whole_number(given)
            seeds = [start + i for i in range(count)]
    except ValueError:
        seeds = []
    if len(seeds) != count or not all(0 <= value <= MAX_SEED for value in seeds):
        wanted = "one seed" if count == 1 else f"{count} seeds"
        raise InputError(
            f"there must be {wanted}, whole numbers from 0 to 2**64 - 1",
            value=seed,
            remedy="Give one integer for the batch, or one per image.",
        )
    return seeds


def noise_from_seeds(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Unit-normal latents (B, *shape) float32, drawn on the host: the same on every device."""
    return torch.stack([torch.randn(shape, generator=seeded_generator(seed)) for seed in seeds])


def check_latents(latents: Tensor, expected: tuple[int, ...]) -> Tensor:
    """``latents`` as float32, a tensor of its own that autograd can use.

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
    # a copy: one of inference mode could not be differentiated
    return latents.detach().to(torch.float32, copy=True)


def check_callback(callback: object) -> None:
    """Raises UsageError for what is neither None nor a function."""
    if callback is not None and not callable(callback):
        raise UsageError(
            "callback_on_step_end must be a function",
            value=callback,
            remedy="Give one that takes (pipeline, step, timestep, tensors).",
        )


def next_latents(changed: object, z: Tensor) -> Tensor:
    """The latents to go on with after a callback returned ``changed`` for ``z``.

    Raises:
        UsageError: neither None nor a mapping, or its "latents" do not fit in the place of ``z``.
    """
    if changed is None:
        return z
    remedy = 'Return None, or {"latents": tensor} with the shape of the tensor that came.'
    if not isinstance(changed, Mapping):
        raise UsageError(
            "callback_on_step_end must return a mapping or None", value=changed, remedy=remedy
        )
    latents: object = changed.get("latents", z)
    if latents is z:
        return z
    if not isinstance(latents, Tensor) or latents.shape != z.shape:
        raise UsageError(
            f"callback_on_step_end returned latents that are no tensor of shape {tuple(z.shape)}",
            value=tuple(latents.shape) if isinstance(latents, Tensor) else latents,
            remedy=remedy,
        )
    if not latents.is_floating_point():
        raise UsageError(
            "callback_on_step_end returned latents that are no floating-point numbers",
            value=str(latents.dtype),
            remedy=remedy,
        )
    # a copy, see check_latents
    return latents.detach().to(z.device, z.dtype, copy=True)


def override_settings(defaults: AlignmentSettings, **overrides: Any) -> AlignmentSettings:
    """``defaults`` with every override that is not None.

    Raises:
        SettingsError: a value is out of range or not finite.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    return AlignmentSettings(**{**dict(defaults), **given})


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
    remedy = Remedy("Use cpu or cuda.", command="Use --device cpu or --device cuda.")
    try:
        if not isinstance(device, str):
            raise TypeError("no string")
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise UsageError("unknown device", value=device, remedy=remedy) from error
    runs_on = devices_of(backend)
    if kind == "cuda" and not torch.cuda.is_available():
        doctor = "hcma-fast doctor says what torch was built for."
        if "cpu" in runs_on:
            raise BackendError(
                "torch finds no CUDA device",
                value=device,
                remedy=Remedy(
                    f"Use the device cpu; {doctor}", command=f"Use --device cpu; {doctor}"
                ),
            )
        raise BackendError(
            f"the backend {backend} needs an NVIDIA GPU, and torch finds no CUDA device",
            value=device,
            remedy=Remedy(
                f'Use backend="onnxruntime"; {doctor}',
                command=f"Use --backend onnxruntime; {doctor}",
            ),
        )
    if kind not in runs_on:
        raise BackendError(
            f"the backend {backend} does not run on this device",
            value=device,
            remedy=f"Use the device {runs_on[0]}, or another backend.",
        )


_MOST_BYTES = 4096
_MOST_PART_BYTES = 255


def check_names(model: object, aligner: object, *words: object) -> None:
    """Whether paths and names of a model, a backend, a device can be such at all.

    Raises:
        UsageError: one is no text. WeightsError: a path that no file system takes.
    """
    for word in words:
        if word is not None and not isinstance(word, str):
            raise UsageError("this must be a name", value=word, remedy='Write backend="eager".')
    for path in (model,) if aligner is None else (model, aligner):
        if isinstance(path, Checkpoint):
            continue  # located before
        if not isinstance(path, str | os.PathLike):
            raise UsageError(
                "a model must be a name or a path", value=path, remedy='Write "tiny", or a folder.'
            )
        text = os.fspath(path)
        parts = [len(part) for part in os.fsencode(text).split(b"/")] if _is_text(text) else []
        if not parts or sum(parts) > _MOST_BYTES or max(parts) > _MOST_PART_BYTES:
            raise WeightsError(
                "this cannot be the name of a model or a folder",
                value=text,
                remedy="Give a preset, a folder or a hub id.",
            )


def _is_text(path: object) -> bool:
    """Whether a file system can be asked for it."""
    try:
        return isinstance(path, str) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
