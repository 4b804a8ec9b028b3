"""From the plain loop to the full runtime, one optimisation at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hcma_fast.bench.shared.plots import figure_png, new_figure
from hcma_fast.bench.speed.harness.contestants import SD14, Ours
from hcma_fast.bench.speed.harness.plan import Plan, side_by_side
from hcma_fast.bench.speed.harness.rounds import Group
from hcma_fast.bench.speed.plain_and_ours import ours_case, plain_case
from hcma_fast.sampling.capture import CAPTURABLE
from hcma_fast.specs import GraphName

if TYPE_CHECKING:
    from hcma_fast.bench.speed.harness.report import Row

_UNETS: tuple[GraphName, ...] = ("unet_grounded", "unet_plain")


def ladder(plan: Plan) -> list[Group]:
    """Each rung has what those before it have, but for what its name says."""
    work = plan.work()
    rungs = _gpu_rungs(plan) if plan.on_gpu else _cpu_rungs(plan)
    if plan.quick:
        # without engines; on a GPU with CUDA graphs
        rungs = [(name, ours) for name, ours in rungs if ours.backend == "eager"]
    cases = [ours_case(plan.model, ours, work, plan.device, name) for name, ours in rungs]
    return side_by_side(plan, "ladder", [plain_case(plan.model, work, plan.device), *cases])


def _cpu_rungs(plan: Plan) -> list[tuple[str, Ours]]:
    rungs = [
        # keys and values of caption and boxes once per image, nothing that is thrown away
        ("our sampler and graphs, torch eager", Ours("eager")),
        ("gradient by torch.compile", Ours("eager", grad_backend="compile")),
    ]
    for place, ours in enumerate(ours for ours in plan.chosen if ours.backend != "eager"):
        if place:
            rungs.append((f"all graphs on {ours.label} instead", ours))
            continue
        rungs += [
            (f"UNet on {ours.label}", replace(ours, graphs=_UNETS, grad_backend="compile")),
            (f"gradient on {ours.label}", replace(ours, graphs=(*_UNETS, "align"))),
            ("text encoder, grounding and VAE too", ours),
        ]
    return rungs


def _gpu_rungs(plan: Plan) -> list[tuple[str, Ours]]:
    fused = find_spec("triton") is not None
    best = Ours("eager", grad_backend="triton" if fused else "compile")
    rungs = [
        ("our sampler and graphs, torch eager", Ours("eager")),
        ("gradient by torch.compile", Ours("eager", grad_backend="compile")),
    ]
    if fused:
        rungs.append(("its losses and pooling by Triton kernels", best))
    rungs += [
        ("a CUDA graph per evaluation", replace(best, cuda_graphs="step")),
        ("one CUDA graph for all evaluations", replace(best, cuda_graphs="trajectory")),
    ]
    compiled = dict.fromkeys(ours.backend for ours in plan.chosen if ours.backend in CAPTURABLE)
    for backend in (name for name in compiled if name != "eager"):
        ours = Ours(backend, cuda_graphs="trajectory")
        half = replace(ours, precision="float16")
        rungs += [
            (f"all graphs on {backend} instead", ours),
            (f"{backend} in float16", half),
        ]
        # tiny leaves steps unaligned, where step graphs would not be used
        if plan.model == SD14:
            rungs.append((f"{backend}, a whole evaluation as one engine", replace(half, fuse=True)))
    # names are keys
    return [(f"{place}. {name}", ours) for place, (name, ours) in enumerate(rungs, 1)]


def ladder_png(rows: Sequence[Row]) -> bytes:
    """Speed-up of each rung over the plain loop with its interval, as a PNG; void rows are left
    out."""
    counted = [row for row in rows if row.speedup is not None]
    # at full size the plain loop is beside every rung, with one row each
    unique = list({row.name: row for row in counted}.values())
    figure = new_figure(9, 0.9 + 0.45 * len(unique))
    axes = figure.subplots()
    values = [row.speedup or 0.0 for row in unique]
    ends = [
        row.speedup_interval or (value, value) for row, value in zip(unique, values, strict=True)
    ]
    errors = [
        [value - low for value, (low, _) in zip(values, ends, strict=True)],
        [high - value for value, (_, high) in zip(values, ends, strict=True)],
    ]
    places = range(len(unique))
    axes.barh(places, values, xerr=errors, color="tab:blue", capsize=3)
    axes.set_yticks(places, [row.name for row in unique])
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over the plain diffusers loop (p10 to p90 of the rounds)")
    axes.axvline(1, color="black", linewidth=1)
    return figure_png(figure)
