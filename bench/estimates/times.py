"""From counts and a card's rates to times: floor, practical floor, and without any fusion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from hcma_fast.bench.estimates.counting import Counts, Operation
from hcma_fast.bench.estimates.gpus import GPU, GPUS, PEERS
from hcma_fast.specs import GraphName


class Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Call(NamedTuple):
    """A graph, the batch that it is called with, and how often for one batch of images."""

    graph: GraphName
    batch: int
    times: int


class CallTime(Report):
    """One call on one card, in seconds; an estimate."""

    graph: GraphName
    batch: int
    compute_s: float
    memory_s: float
    floor_s: float
    bound: Literal["compute", "memory"]
    unfused_s: float
    practical_s: float
    """what fused kernels can reach, see :func:`time_call`"""


class BatchTime(Report):
    """One batch of images on one card; an estimate."""

    gpu: str
    batch: int
    calls: tuple[CallTime, ...]
    evaluation_floor_s: float
    """the UNet on both halves of the guidance"""
    evaluation_practical_s: float
    step_floor_s: float
    """alignment and evaluation, as all PLMS steps but the first have"""
    step_unfused_s: float
    step_practical_s: float
    image_floor_s: float
    """all calls, by the images of the batch"""
    image_unfused_s: float
    image_practical_s: float
    align_share: float
    """of the step's floor"""
    align_share_unfused: float


class PeerTime(Report):
    """A published speed beside ours: the same share of the card's peak, for our UNet."""

    gpu: str
    name: str
    evaluations_per_s: float
    """of plain Stable Diffusion, as published"""
    share_of_peak: float
    ours_at_that_share_s: float
    """an evaluation with the gated layers"""


def time_call(graph: GraphName, batch: int, counts: Counts, gpu: GPU) -> CallTime:
    """The floor of one call, the practical floor, and the sum of its operators' own.

    The practical floor has a kernel for each product and each norm, and nothing else: pointwise
    operators are fused into them. A kernel takes as long as the slowest of its operations (with the
    zeros that fill up attention's heads), its exponentials, and its operands and result through the
    memory. A norm reads and writes its values once, in the precision of the products.
    """
    computing = [operation.flops / gpu.rate(operation.dtype) for operation in counts.operations]
    moving = [operation.bytes / gpu.bandwidth for operation in counts.operations]
    compute, memory = sum(computing), counts.compulsory_bytes / gpu.bandwidth
    unfused = sum(max(pair) for pair in zip(computing, moving, strict=True))
    floor = max(compute, memory)
    halves = any(o.flops and gpu.rate(o.dtype) == gpu.half_flops for o in counts.operations)
    practical = sum(
        _fused(o, arithmetic, moved, gpu, 2 if halves else 4)
        for o, arithmetic, moved in zip(counts.operations, computing, moving, strict=True)
    )
    return CallTime(
        graph=graph,
        batch=batch,
        compute_s=compute,
        memory_s=memory,
        floor_s=floor,
        bound="compute" if compute >= memory else "memory",
        # an input that no operator reads counts for the floor only
        unfused_s=max(unfused, floor),
        practical_s=max(practical, floor),
    )


def _fused(operation: Operation, arithmetic: float, moved: float, gpu: GPU, width: int) -> float:
    if operation.normalised:
        return 2 * width * operation.normalised / gpu.bandwidth
    if not operation.flops:
        return 0.0
    padded = arithmetic * (1 + operation.padding_flops / operation.flops)
    return max(padded, operation.exponentials / gpu.special_rate, moved)


def batch_times(
    gpu: str,
    batch: int,
    wanted: Iterable[Call],
    found: Mapping[tuple[GraphName, int], Counts],
) -> BatchTime:
    listed = list(wanted)
    timed = [time_call(call.graph, call.batch, found[call[:2]], GPUS[gpu]) for call in listed]
    by_graph = {time.graph: time for time in timed}
    times = {call.graph: call.times for call in listed}
    unet = by_graph["unet_grounded" if times["unet_grounded"] else "unet_plain"]
    align, align_unfused = (
        (by_graph["align"].floor_s, by_graph["align"].unfused_s) if times["align"] else (0.0, 0.0)
    )
    align_practical = by_graph["align"].practical_s if times["align"] else 0.0
    step, step_unfused = align + unet.floor_s, align_unfused + unet.unfused_s
    pairs = list(zip(listed, timed, strict=True))
    return BatchTime(
        gpu=gpu,
        batch=batch,
        calls=tuple(timed),
        evaluation_floor_s=unet.floor_s,
        evaluation_practical_s=unet.practical_s,
        step_floor_s=step,
        step_unfused_s=step_unfused,
        step_practical_s=align_practical + unet.practical_s,
        image_floor_s=sum(call.times * time.floor_s for call, time in pairs) / batch,
        image_unfused_s=sum(call.times * time.unfused_s for call, time in pairs) / batch,
        image_practical_s=sum(call.times * time.practical_s for call, time in pairs) / batch,
        align_share=align / step,
        align_share_unfused=align_unfused / step_unfused,
    )


def peer_times(plain_flops: int, gated_flops: int, gpus: Iterable[str]) -> tuple[PeerTime, ...]:
    """Published speeds on these cards, by the operations of one evaluation at batch 1."""
    found = []
    for peer in (peer for gpu in gpus for peer in PEERS if peer.gpu == gpu):
        rate = plain_flops * peer.evaluations_per_s
        share = rate / GPUS[peer.gpu].half_flops
        found.append(
            PeerTime(**peer._asdict(), share_of_peak=share, ours_at_that_share_s=gated_flops / rate)
        )
    return tuple(found)
