"""What a model without an aligner, or without GLIGEN's layers, can be asked for."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import InputError, Remedy, UsageError
from hcma_fast.layout import Layout
from hcma_fast.sampling.savings import Savings
from hcma_fast.specs import GraphName


def check_abilities(
    graphs: Container[GraphName], settings: AlignmentSettings, savings: Savings, layout: Layout
) -> None:
    """Refuse what the graphs of a model cannot do.

    Raises:
        UsageError: an alignment without an aligner, gated attention without GLIGEN's layers.
        InputError: boxes that nothing would read.
    """
    aligner, gligen = "align" in graphs, "unet_grounded" in graphs
    if not aligner and (settings.eta0 > 0 or not savings.skip_idle_alignment):
        raise _without("an aligner", "eta0", settings.eta0, "skip_idle_alignment")
    if not gligen and (settings.grounding_beta > 0 or not savings.skip_closed_gate):
        raise _without(
            "GLIGEN's layers", "grounding_beta", settings.grounding_beta, "skip_closed_gate"
        )
    if not gligen and layout.boxes and not settings.eta0:
        raise InputError(
            "this model has no GLIGEN layers and aligns nothing: boxes would have no effect",
            value=list(layout.phrases),
            remedy=Remedy(
                python="Load it with gligen=FILE, or leave out the boxes.",
                command="Add --gligen FILE, or leave out the boxes.",
                http="Leave out the boxes.",
            ),
        )


def _without(part: str, name: str, value: Any, saving: str) -> UsageError:
    return UsageError(
        f"this model has no {part[3:] if part.startswith('an ') else part}",
        value=f"{name}={value}",
        remedy=f"Leave {name} and {saving} out, or load a model with {part}.",
    )
