"""The least time that a model can take on a GPU, by its published peak rates: an estimate.

The roofline model (Williams, Waterman and Patterson 2009, "Roofline: An Insightful Visual
Performance Model for Multicore Architectures", CACM 52(4)): a call takes at least as long as its
operations at the peak rate, and as its bytes at the peak bandwidth, whichever is longer. Bytes of
the floor are the compulsory ones: every weight that is used once per call, inputs and outputs, and
no activation. Beside it stands what the same operators take one by one, each at its own roofline,
when each reads its operands from memory and writes its result there: what kernels without fusion
cannot beat, and a practical floor between the two (:mod:`.times`). Nothing is run or timed.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from hcma_fast.bench.estimates.counting import Counts, count_module
from hcma_fast.bench.estimates.gpus import GPU, GPUS
from hcma_fast.bench.estimates.onnx_counting import count_onnx
from hcma_fast.bench.estimates.times import (
    BatchTime,
    Call,
    PeerTime,
    Report,
    batch_times,
    peer_times,
)
from hcma_fast.bench.shared.machine import Machine, describe_machine
from hcma_fast.config import MAX_OBJECTS, AlignmentSettings
from hcma_fast.errors import InputError, UsageError
from hcma_fast.export.manifest import MANIFEST_FILE, load_manifest
from hcma_fast.export.precision import Precision, at_precision, check_precision
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.models.checkpoint.info import CheckpointInfo
from hcma_fast.models.checkpoint.random_sd14 import RandomSD14
from hcma_fast.sampling.schedule import eta_table
from hcma_fast.sampling.solvers import plms
from hcma_fast.schedule import grounded_steps
from hcma_fast.specs import ANY_BATCH, MAX_BATCH, BatchRange, GraphName

MAX_ALIGN_SHARE = 0.05
"""Of the alignment in a denoising step's floor: the goal."""


class GraphCounts(Report):
    """Counted, the same on every card."""

    graph: GraphName
    batch: int
    """what the graph gets: texts, halves of the guidance or images"""
    times: int
    """calls per batch of images"""
    flops: int
    flops_by_dtype: dict[str, int]
    padding_flops: int
    """of attention's heads, filled up with zeros"""
    exponentials: int
    normalised: int
    """values that norms read"""
    weights_bytes: int
    io_bytes: int
    unfused_bytes: int


class RooflineReport(Report):
    """What :func:`roofline` found; all times are estimates."""

    kind: Literal["estimate"] = "estimate"
    command: str
    model: str
    preset: str
    counted: Literal["torch modules", "ONNX graphs"]
    height: int
    width: int
    precision: Precision
    num_inference_steps: int
    boxes: int
    """per image, each with a phrase of its own"""
    guided: bool
    counts: dict[int, tuple[GraphCounts, ...]]
    """by batch of images"""
    gpus: dict[str, GPU]
    rows: tuple[BatchTime, ...]
    peers: tuple[PeerTime, ...]
    """of full size only"""
    align_share_goal: float = MAX_ALIGN_SHARE
    machine: Machine


def parse_gpus(text: str) -> list[str]:
    """Names of cards from "h100,a100".

    Raises:
        UsageError: a card is unknown, or named twice.
    """
    return _listed(text, "card", GPUS.__contains__, f"Known: {', '.join(GPUS)}.")


def parse_batches(text: str) -> list[int]:
    """Batch sizes from "1,4,16".

    Raises:
        UsageError: one is no number from 1 to 512, or named twice.
    """
    largest = MAX_BATCH // 2  # the UNet gets both halves of the guidance

    def valid(part: str) -> bool:
        return bool(re.fullmatch(r"[0-9]{1,4}", part)) and 1 <= int(part) <= largest

    remedy = f"Write numbers from 1 to {largest} with commas, such as 1,4,16."
    return [int(part) for part in _listed(text, "batch size", valid, remedy)]


def _listed(text: str, what: str, valid: Callable[[str], bool], remedy: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not valid(part):
            raise UsageError(f"this is no {what} that I know", value=part, remedy=remedy)
    if len({part.lstrip("0") for part in parts}) < len(parts):
        raise UsageError(f"a {what} is named twice", value=text, remedy="Name each once.")
    return parts


def calls(settings: AlignmentSettings, steps: int, boxes: int, batch: int) -> list[Call]:
    """What the pipeline calls for ``batch`` images with ``boxes`` phrases each.

    No text is shared but the negative prompt. The rules are those of ``sampling.conditioning``
    and ``sampling.state``; the tests compare.
    """
    table = plms(steps)
    guided = settings.guidance_scale > 1
    halves = 2 if guided else 1
    aligning = bool((eta_table(table, settings) > 0).any())
    grounded = int((table.step_index < grounded_steps(settings.grounding_beta, steps)).sum())
    found = [
        Call("text_encoder", batch * (1 + boxes) + guided, 1),
        Call("grounding", batch, halves),
        Call("align", batch, int(table.aligns.sum()) if aligning else 0),
        Call("unet_grounded", batch * halves, grounded),
        Call("unet_plain", batch * halves, len(table) - grounded),
        Call("vae_decoder", batch, 1),
    ]
    return [call for call in found if call.batch]


def roofline(
    model: str = "sd14",
    *,
    gpus: Sequence[str] = tuple(GPUS),
    batches: Sequence[int] = (1, 4, 16),
    precision: str | None = None,
    num_inference_steps: int = 50,
    boxes: int = 2,
    progress: Callable[[str], None] = lambda message: None,
) -> RooflineReport:
    """Count a model's graphs, and say how long they take at least.

    Args:
        model: ``sd14`` (full size, no weights needed), a preset, a folder or hub id of a
            checkpoint, or an engine folder of onnxruntime, whose ONNX graphs are counted. Its own
            settings are taken, and the size that it was trained at or built for.
        gpus: of :data:`GPUS`; batches: images at once.
        precision: of weights and activations, as in a build, float16 by default; `grounding` stays
            in float32. An engine folder has its own.
        boxes: per image, each with a phrase of its own.
        progress: told what is being counted.

    Raises:
        UsageError: an unknown card or precision, a number out of its range, an engine folder of
            another backend.
        InputError: a batch that the engines were not built for.
        WeightsError, EngineError: no such model, or a damaged one.
    """
    gpus, batches = parse_gpus(",".join(gpus)), parse_batches(",".join(map(str, batches)))
    checked = check_precision(precision) if precision is not None else "float16"
    if not 0 <= boxes <= MAX_OBJECTS:
        remedy = f"An image has 0 to {MAX_OBJECTS}."
        raise UsageError("too many boxes, or fewer than none", value=boxes, remedy=remedy)
    plms(num_inference_steps)
    if (Path(model) / MANIFEST_FILE).is_file():
        source = _onnx_source(Path(model), precision)
    else:
        source = _torch_source(model, checked)
    for size in batches:
        if not source.batch.min <= size <= source.batch.max:
            raise InputError(
                f"these engines were built for batches of {source.batch}",
                value=size,
                remedy="Give another batch, or build for more with --batch.",
            )
    info = source.info
    wanted = {size: calls(info.alignment, num_inference_steps, boxes, size) for size in batches}
    found: dict[tuple[GraphName, int], Counts] = {}
    every = [call for listed in wanted.values() for call in listed]
    for name in dict.fromkeys(call.graph for call in every):
        progress(f"counting {name}")
        sizes = sorted({call.batch for call in every if call.graph == name})
        found |= {(name, size): c for size, c in zip(sizes, source.count(name, sizes), strict=True)}
    return RooflineReport(
        command=_command(model, gpus, batches, precision, num_inference_steps, boxes),
        model=model,
        preset=info.preset,
        counted=source.counted,
        height=source.height,
        width=source.width,
        precision=source.precision,
        num_inference_steps=num_inference_steps,
        boxes=boxes,
        guided=info.alignment.guidance_scale > 1,
        counts={
            size: tuple(_summary(call, found[call[:2]]) for call in wanted[size])
            for size in batches
        },
        gpus={name: GPUS[name] for name in gpus},
        rows=tuple(
            batch_times(name, size, wanted[size], found) for name in gpus for size in batches
        ),
        peers=_peers(source, found, gpus),
        machine=describe_machine(),
    )


def _peers(
    source: _Source, found: Mapping[tuple[GraphName, int], Counts], gpus: Sequence[str]
) -> tuple[PeerTime, ...]:
    """Published speeds are of full size, with guidance and for one image."""
    if (source.info.preset, source.height, source.width) != ("sd14", 512, 512):
        return ()
    plain, gated = found.get(("unet_plain", 2)), found.get(("unet_grounded", 2))
    return () if plain is None or gated is None else peer_times(plain.flops, gated.flops, gpus)


@dataclass(frozen=True)
class _Source:
    """A model whose graphs can be counted, each at several batch sizes."""

    info: CheckpointInfo
    counted: Literal["torch modules", "ONNX graphs"]
    height: int
    width: int
    precision: Precision
    batch: BatchRange
    """of images"""
    count: Callable[[GraphName, Sequence[int]], list[Counts]]


def _torch_source(model: str, precision: Precision) -> _Source:
    parts = RandomSD14().without_weights() if model == "sd14" else load_components(model)
    specs, side = parts.specs(), parts.image_size

    def count(name: GraphName, sizes: Sequence[int]) -> list[Counts]:
        module = at_precision(name, parts.graph(name), precision)
        return [count_module(module, specs[name], size) for size in sizes]

    return _Source(parts.info, "torch modules", side, side, precision, ANY_BATCH, count)


def _onnx_source(folder: Path, precision: str | None) -> _Source:
    manifest = load_manifest(folder)
    if manifest.backend != "onnxruntime":
        raise UsageError(
            "only engine folders of onnxruntime hold the graphs as they are run",
            value=manifest.backend,
            remedy="Give the checkpoint instead, or a folder of hcma-fast build --backend "
            "onnxruntime.",
        )
    if precision not in (None, manifest.precision):
        remedy = "Leave the precision out, or give the checkpoint instead."
        raise UsageError(
            f"this engine folder was built in {manifest.precision}", value=precision, remedy=remedy
        )

    def count(name: GraphName, sizes: Sequence[int]) -> list[Counts]:
        return [count_onnx(folder / manifest.graphs[name].file, size) for size in sizes]

    height, width = manifest.graphs["vae_decoder"].spec.outputs[0].shape[2:]
    own, batch = cast(Precision, manifest.precision), manifest.graphs["align"].spec.batch
    return _Source(manifest.info, "ONNX graphs", int(height), int(width), own, batch, count)


def _summary(call: Call, counts: Counts) -> GraphCounts:
    by_dtype: Counter[str] = Counter()
    for operation in counts.operations:
        by_dtype[operation.dtype] += operation.flops
    return GraphCounts(
        graph=call.graph,
        batch=call.batch,
        times=call.times,
        flops=counts.flops,
        flops_by_dtype={dtype: flops for dtype, flops in by_dtype.items() if flops},
        padding_flops=counts.padding_flops,
        exponentials=counts.exponentials,
        normalised=counts.normalised,
        weights_bytes=counts.weights_bytes,
        io_bytes=counts.io_bytes,
        unfused_bytes=counts.unfused_bytes,
    )


def _command(
    model: str,
    gpus: Sequence[str],
    batches: Sequence[int],
    precision: str | None,
    steps: int,
    boxes: int,
) -> str:
    words = ["hcma-fast", "bench", "roofline", "--gpu", ",".join(gpus), "--model", model]
    words += ["--batch", ",".join(map(str, batches))]
    words += ["--precision", precision] if precision is not None else []
    return shlex.join([*words, "--steps", str(steps), "--boxes", str(boxes)])
