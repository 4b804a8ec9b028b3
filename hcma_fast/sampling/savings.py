"""What the sampler leaves out in order to be faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from hcma_fast.config import Real, Settings, Whole
from hcma_fast.errors import SettingsError, UsageError


class Savings(Settings):
    """Switches of the sampler. The default changes no image; ``align_every``, ``guidance_end`` and
    ``latent_dtype`` make approximate ones."""

    skip_idle_alignment: bool = True
    """exact: leave out the `align` graph where its rate is 0. False runs it at every PLMS step, and
    so records losses at every step"""
    contexts_once: bool = True
    """exact: the keys and values of texts and boxes, of both halves of the guidance, come from one
    run of the `grounding` graph before the steps. False runs it again in every evaluation"""
    skip_closed_gate: bool = True
    """exact: after the last step with gated attention, run `unet_plain`, which has none. False runs
    `unet_grounded` there too, with its gate at 0"""
    align_every: Whole = Field(1, ge=1)
    """approximate: compute the alignment gradient (Eq. 8) at every k-th aligned step, and follow it
    again, at their own rates, in the steps between, which record no losses"""
    guidance_end: Real = Field(1.0, gt=0, le=1)
    """approximate: share of the PLMS steps, from the first, with classifier-free guidance, rounded
    to whole steps (a half to the even number), and at least one. The rest evaluates the conditional
    half alone (Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval", which also
    leaves out the first steps)"""
    latent_dtype: Literal["float32", "bfloat16"] = "float32"
    """approximate: what the latent and the noise history are kept in between evaluations; engines
    and updates compute as before"""

    @property
    def approximate(self) -> bool:
        """Whether images change."""
        return self.model_copy(update=dict.fromkeys(_EXACT, True)) != EXACT


_EXACT = ("skip_idle_alignment", "contexts_once", "skip_closed_gate")

EXACT = Savings()
"""Nothing that changes an image."""


def check_savings(savings: object) -> None:
    """Raises UsageError for what is not :class:`Savings`."""
    if not isinstance(savings, Savings):
        raise UsageError(
            "savings must be a hcma_fast.sampling.savings.Savings",
            value=savings,
            remedy="Write Savings(align_every=2), or leave it out.",
        )


_REMEDY = (
    "Use align_every=N from 1, guidance_end=SHARE above 0 and up to 1, latent_dtype=float32 or "
    f"bfloat16; of {', '.join(_EXACT)}: NAME=true or NAME=false."
)


def parse_savings(texts: Sequence[str]) -> Savings:
    """From "align_every=2", "guidance_end=0.8" and so on, each name once.

    Raises:
        UsageError: an unknown name, a name twice, or a value out of its range.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        known = name in Savings.model_fields
        if not equals or not known or name in given:
            raise UsageError(
                "a saving reads NAME=VALUE, each name once" if known else "unknown saving",
                value=text,
                remedy=_REMEDY,
            )
        given[name] = value
    try:
        return Savings(**given)
    except SettingsError as error:
        raise SettingsError(error.what, value=error.value, remedy=_REMEDY) from error
