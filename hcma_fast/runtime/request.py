"""A request and its result: one image that is asked for, and what became of it.

Options of the command line, JSONL lines, sidecars and ``pipe(...)`` all become a
:class:`Request`. A new field is added here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from hcma_fast.config import (
    MAX_SEED,
    NO_OPTION,
    AlignmentSettings,
    Asked,
    Sampler,
    Settings,
    SettingsChange,
    settings_error,
)
from hcma_fast.errors import HcmaError, InputError, UsageError
from hcma_fast.layout import Layout
from hcma_fast.sampling.savings import EXACT, Savings, check_savings
from hcma_fast.scalars import whole_number

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from hcma_fast.sampling.schedule import StepLosses

_LEAST_STEPS, _MOST_STEPS = 2, 999
_OWN = "the model's own"
_NO_BOXES = Layout.empty()


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise InputError("a prompt must be a string", value=value, remedy='Write "a dog".')
    return value


def as_layout(value: object) -> Layout:
    """A layout, also from a mapping with ``phrases`` and ``boxes``; its boxes are checked.

    Raises:
        InputError: it is none.
    """
    if isinstance(value, Mapping) and value.keys() == {"phrases", "boxes"}:
        return Layout(**value)
    if not isinstance(value, Layout):
        raise InputError(
            "a layout must be a hcma_fast.Layout",
            value=value,
            remedy='Write Layout(["dog"], [[0.1, 0.1, 0.5, 0.9]]).',
        )
    # pydantic's model_construct checks nothing
    return Layout(value.phrases, value.boxes)


def _seed(value: object) -> int:
    try:
        seed = whole_number(value)
    except ValueError:
        seed = -1
    if not 0 <= seed <= MAX_SEED:
        raise InputError(
            "a seed must be a whole number from 0 to 2**64 - 1",
            value=value,
            remedy="Choose a smaller, positive one.",
        )
    return seed


def _steps(value: object) -> int:
    try:
        steps = whole_number(value)
    except ValueError:
        steps = 0
    if not _LEAST_STEPS <= steps <= _MOST_STEPS:
        raise UsageError(
            f"num_inference_steps must be a whole number from {_LEAST_STEPS} to {_MOST_STEPS}",
            value=value,
            remedy="The paper uses 50; 20 gives a quick preview.",
        )
    return steps


def _settings(value: object) -> SettingsChange:
    if isinstance(value, SettingsChange):
        return value
    if value is None:
        return SettingsChange()
    if isinstance(value, AlignmentSettings):
        # pydantic's model_construct checks nothing
        return SettingsChange(**vars(value))
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return SettingsChange(**value)
    raise UsageError(
        "settings must be a hcma_fast.config.AlignmentSettings",
        value=value,
        remedy="Give pipe.settings.model_copy(update={...}), or None.",
    )


def _savings(value: object) -> Savings:
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return Savings(**value)
    check_savings(value)
    assert isinstance(value, Savings)
    return value


class Request(Settings):
    """One image that is asked for.

    ``Request("a dog", layout, seed=3)``. It is checked once, here; whether the engines can do it,
    and whether a text fits the text encoder, is checked before a batch runs.

    Raises:
        InputError: a prompt, layout or seed is none.
        UsageError: the number of steps, a setting or a saving is out of its range.
    """

    prompt: Annotated[str, BeforeValidator(_text)] = Field(description="Caption of the image.")
    negative_prompt: Annotated[str, BeforeValidator(_text), Asked(default="nothing")] = Field(
        "", description="What the image should not show."
    )
    layout: Annotated[Layout, BeforeValidator(as_layout), NO_OPTION] = Field(
        _NO_BOXES, description="Phrases and their boxes."
    )
    seed: Annotated[int, BeforeValidator(_seed), Asked(default="random")] = Field(
        0, ge=0, le=MAX_SEED, description="Seed of the first image; the others count up."
    )
    sampler: Sampler = Field("plms", description="Solver: the method that removes the noise.")
    num_inference_steps: Annotated[int, BeforeValidator(_steps), Asked("--steps")] = Field(
        50, ge=_LEAST_STEPS, le=_MOST_STEPS, description="Sampling steps."
    )
    settings: Annotated[SettingsChange, BeforeValidator(_settings), Asked(default=_OWN)] = Field(
        SettingsChange(), description="Changes of the checkpoint's settings."
    )
    savings: Annotated[
        Savings,
        BeforeValidator(_savings),
        Asked("--saving", metavar="NAME=VALUE", default="none, exact"),
    ] = Field(
        EXACT,
        description="Faster, for an approximate image: align_every=2, guidance_end=0.8, "
        "latent_dtype=bfloat16; repeat it. Slower, for the same image, to check the exact "
        "ones: skip_idle_alignment=false, contexts_once=false, skip_closed_gate=false (the "
        "last changes nothing where --grounding-beta is 1).",
    )

    # `settings` also takes AlignmentSettings, a mapping or None: so no types of the fields here
    def __init__(self, /, prompt: Any, layout: Any = _NO_BOXES, **values: Any) -> None:
        try:
            super(Settings, self).__init__(prompt=prompt, layout=layout, **values)
        except ValidationError as error:
            raise _typed(error) from error

    def resolved(self, defaults: AlignmentSettings) -> Self:
        """The same request with all settings, those that it leaves open from ``defaults``."""
        full = SettingsChange.model_construct(**dict(self.settings.over(defaults)))
        # all parts have been checked: a plain copy
        return BaseModel.model_copy(self, update={"settings": full})


def _typed(error: ValidationError) -> HcmaError:
    """The first problem, as the error that the field's own check raised, if it did."""
    cause = error.errors(include_url=False)[0].get("ctx", {}).get("error")
    return cause if isinstance(cause, HcmaError) else settings_error(error)


def as_requests(given: object) -> list[Request]:
    """The requests as a list.

    Raises:
        InputError: one of them is none, or they are no list.
    """
    if isinstance(given, Request) or not isinstance(given, Iterable):
        raise InputError(
            "requests must be a list of Request", value=given, remedy="Write [Request(...)]."
        )
    requests = list(given)
    for number, request in enumerate(requests):
        if not isinstance(request, Request):
            raise InputError(
                "this is no hcma_fast.Request",
                value=request,
                remedy='Write Request("a dog", Layout(["dog"], [[0.1, 0.1, 0.5, 0.9]])).',
            ).of_request(number)
    return requests


@dataclass(frozen=True)
class Result:
    """What became of one request: an image, or the error that it alone has."""

    index: int
    """of the request"""
    image: Image.Image | None
    latent: Tensor
    """(4, h, w) float32 on the device, clean and scaled"""
    seed: int
    losses: list[StepLosses]
    """one per step that computed the alignment, of this image: loss_global (), loss_local (M,)"""
    batch_size: int
    """images that were computed together, padding included"""
    error: HcmaError | None = None
