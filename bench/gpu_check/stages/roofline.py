"""What each measured evaluation could have taken: floors beside the times of the stage `unet`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hcma_fast.bench.estimates.counting import count_module
from hcma_fast.bench.estimates.gpus import GPUS, card_of
from hcma_fast.bench.estimates.times import peer_times, time_call
from hcma_fast.bench.gpu_check.device import Device
from hcma_fast.bench.gpu_check.records import OK, load_check
from hcma_fast.bench.gpu_check.weights import model_parts
from hcma_fast.bench.gpu_check.worker import Case, Figures
from hcma_fast.errors import InputError
from hcma_fast.export.precision import at_precision
from hcma_fast.specs import GraphName

GOAL_SHARE, GOAL_SHARE_BATCH_8 = 0.25, 0.5
"""Of the dense peak, at batch 1 and 8"""
_EVALUATIONS: tuple[GraphName, ...] = ("unet_plain", "unet_grounded")


def cases(device: Device, *, small: bool, result: Path) -> list[Case]:
    """One for each time of the UNet that was measured, and the published speeds on this card."""
    card = device.describe()["name"]
    stage = load_check(result).stages.get("unet")
    measured = {} if stage is None else {n: stage.cases[n]["figures"] for n in stage.names(OK)}
    timed = {name: figures for name, figures in measured.items() if "median_ms" in figures}
    return [
        *(Case(name, partial(_beside, card, figures)) for name, figures in timed.items()),
        Case("published peers", partial(_peers, card)),
    ]


def _card(name: str) -> str:
    """Its key in :data:`GPUS`.

    Raises:
        InputError: its rates are not known.
    """
    found = card_of(name)
    if found is None:
        raise InputError(
            "this card's published rates are not in bench/estimates/gpus.py, so there is no floor",
            value=name,
            remedy="Add them from its data sheet, and run --stage roofline again.",
        )
    return found


def _beside(card: str, figures: dict[str, Any]) -> Figures:
    gpu = GPUS[_card(card)]
    graph, batch = figures["graph"], figures["batch"]
    parts = model_parts("meta", small=figures["model"] == "tiny", parts=())
    module = at_precision(graph, parts.graph(graph), figures["precision"])
    # both halves of the guidance
    counts = count_module(module, parts.specs()[graph], 2 * batch)
    time = time_call(graph, 2 * batch, counts, gpu)
    seconds = figures["median_ms"] / 1e3
    share = counts.flops / seconds / gpu.rate(figures["precision"])
    return {
        "card": gpu.name,
        "batch": batch,
        "gflop": counts.flops / 1e9,
        "measured_ms": figures["median_ms"],
        "floor_ms": time.floor_s * 1e3,
        "practical_floor_ms": time.practical_s * 1e3,
        "unfused_ms": time.unfused_s * 1e3,
        "share_of_peak": share,
        "goal_share": GOAL_SHARE if batch < 8 else GOAL_SHARE_BATCH_8,
    }


def _peers(card: str) -> Figures:
    parts = model_parts("meta", small=False, parts=())
    plain, gated = (
        count_module(parts.graph(graph), parts.specs()[graph], 2).flops for graph in _EVALUATIONS
    )
    return {"rows": [row.model_dump() for row in peer_times(plain, gated, [_card(card)])]}
