"""Requests that must be refused, each with its own typed error, and with nothing else lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hcma_fast.config import MAX_OBJECTS, AlignmentSettings
from hcma_fast.errors import DivergenceError, HcmaError, InputError, SettingsError, UsageError
from hcma_fast.layout import Layout

if TYPE_CHECKING:
    from hcma_fast.runtime.generator import BatchGenerator, Request

_LONG = "many words " * 100
_BOX = (0.1, 0.1, 0.5, 0.9)


@dataclass(frozen=True)
class BadRequest:
    """A request that nobody may get an image of."""

    what: str
    make: Callable[[], Request]
    """may itself raise the error: a layout is checked when it is made"""
    error: type[HcmaError]
    """of exactly this type"""
    alone: bool = False
    """found out only when it runs: the requests beside it get their images"""


def bad_requests(settings: AlignmentSettings) -> tuple[BadRequest, ...]:
    """One of each kind.

    Args:
        settings: the checkpoint's.
    """
    # torch is imported where a process generates, not where it is only told to
    from hcma_fast.runtime.generator import Request
    from hcma_fast.runtime.requests import override_settings

    def with_layout(phrases: Sequence[str], *boxes: Sequence[float]) -> Request:
        return Request("a dog", Layout(phrases, boxes))

    def with_setting(**given: float) -> Request:
        changed = override_settings(settings, **given)
        return Request("a dog", num_inference_steps=4, settings=changed)

    many = MAX_OBJECTS + 1
    layouts: dict[str, tuple[list[str], list[Sequence[float]]]] = {
        "blank phrase": ([" "], [_BOX]),
        "phrase too long": ([_LONG], [_BOX]),
        "phrase without a box": (["dog"], []),
        "more boxes than an image may have": (["dog"] * many, [_BOX] * many),
        "box outside the image": (["dog"], [(0.5, 0.5, 1.5, 0.9)]),
        "inverted box": (["dog"], [(0.5, 0.9, 0.1, 0.1)]),
        "empty box": (["dog"], [(0.5, 0.5, 0.5, 0.9)]),
        "box of NaN": (["dog"], [(0.1, 0.1, math.nan, 0.9)]),
    }
    wrong: dict[str, tuple[Callable[[], Request], type[HcmaError]]] = {
        "prompt too long": (partial(Request, _LONG), InputError),
        "negative prompt too long": (partial(Request, "a", negative_prompt=_LONG), InputError),
        "prompt that is no text": (partial(Request, 7), InputError),  # type: ignore[arg-type]
        "no layout": (partial(Request, "a", None), InputError),  # type: ignore[arg-type]
        "negative seed": (partial(Request, "a", seed=-1), InputError),
        "too few steps": (partial(Request, "a", num_inference_steps=1), UsageError),
        "too many steps": (partial(Request, "a", num_inference_steps=1000), UsageError),
        "guidance of NaN": (partial(with_setting, guidance_scale=math.nan), SettingsError),
        "infinite rate": (partial(with_setting, eta0=math.inf), SettingsError),
        "negative lambda": (partial(with_setting, lambda_local=-1.0), SettingsError),
    }
    found = [BadRequest(what, *made) for what, made in wrong.items()]
    found += [
        BadRequest(what, partial(with_layout, phrases, *boxes), InputError)
        for what, (phrases, boxes) in layouts.items()
    ]
    # in its range, but the latent ends beyond float32
    runaway = partial(with_setting, guidance_scale=1e38)
    return (*found, BadRequest("latent that diverges", runaway, DivergenceError, alone=True))


def check_refused(generator: BatchGenerator, good: Sequence[Request], bad: BadRequest) -> None:
    """It is refused with its error, and the good ones before it too, unless it fails alone.

    Raises:
        HcmaError: it was taken, refused with another error, or others were lost with it.
    """
    found: HcmaError | None = None
    lost, results = False, []
    try:
        for result in generator.generate([*good, bad.make()]):
            results.append(result)  # what came before an error must be seen
    except HcmaError as error:
        # refused first: nothing has run
        found, lost = error, bad.alone or bool(results)
    else:
        errors = {result.index: result.error for result in results}
        found = errors.pop(len(good))
        lost = any(errors.values()) or not bad.alone
    if type(found) is not bad.error or lost:
        raise HcmaError(
            f"a bad request was not refused as it must be ({bad.what})",
            value=found,
            remedy=f"Report it as a bug: it should be {bad.error.__name__}"
            f"{' of this request alone' if bad.alone else ', before anything runs'}.",
        )
