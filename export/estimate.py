"""What a build will take, before it starts: refused then rather than after minutes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from hcma_fast.errors import DeviceMemoryError, InputError
from hcma_fast.export.precision import graph_precision
from hcma_fast.export.target import TRT_LIBRARIES, Target
from hcma_fast.models.checkpoint.folder import ModelSource
from hcma_fast.specs import STEP_NAMES, GraphName

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_HELD = {
    ("onnxruntime", 4): 7.0,
    ("openvino", 4): 10.5,
    ("tensorrt-rtx", 2): 10.0,
    ("tensorrt", 2): 10.0,
}
"""Bytes per weight of the largest graph at the peak, by backend and bytes of a stored weight: as
measured at full size (docs/build.md), but tensorrt's, which is taken to be tensorrt-rtx's. Others
are bounds: torch's weights, the export's, and those of a session that computes float16 in float32,
or of a builder in float32."""
_READ = {"grounding": 0.28, "vae_decoder": 0.63}
"""Share of its modules' weights that a graph reads, where that is not all: the greater one of
`tiny` and `sd14`. `grounding` takes keys and values out of attention layers that it holds whole;
the VAE's encoder is in no graph."""
_LIBRARIES_BYTES = 1_000_000_000
"""torch, the exporter and the backend themselves, and graphs without their weights"""


@dataclass(frozen=True)
class Estimate:
    """From the counts of parameters; activations, which follow the batch, come on top."""

    disk_bytes: int
    """of the finished folder"""
    peak_disk_bytes: int
    """while it is built: TensorRT's engines lie beside the ONNX graphs until all are there"""
    memory_bytes: int
    """at the peak"""


def graph_weights(source: ModelSource, target: Target) -> dict[GraphName, int]:
    """How many weights each graph of ``target`` has."""
    counts = dict(source.parameter_counts())
    if target.fuse == "step":
        counts["step_grounded"] = counts["align"] + counts["unet_grounded"]
        counts["step_plain"] = counts["align"] + counts["unet_plain"]
    return counts


def estimate(source: ModelSource, target: Target) -> Estimate:
    """Disk and memory that building for ``target`` takes."""
    counts = graph_weights(source, target)
    size = 4 if target.backend == "openvino" else _BYTES[target.precision]
    written = {
        name: round(count * _READ.get(name, 1))
        * max(size, _BYTES[graph_precision(name, target.precision)])
        for name, count in counts.items()
    }
    # graphs share their weights in ONNX; a compiled engine holds its own
    shared = sum(n for name, n in written.items() if name not in ("unet_plain", *STEP_NAMES))
    onnx = 0 if target.backend == "torch-compile" else shared
    engines = sum(written.values()) if target.native and not target.strip_weights else 0
    largest = max(counts.values())
    held = _HELD.get((target.backend, size), 16 if target.backend in TRT_LIBRARIES else 12)
    return Estimate(
        # engines that hold their weights need no ONNX graphs beside them
        disk_bytes=engines or onnx,
        peak_disk_bytes=engines + onnx,
        memory_bytes=round(largest * held) + _LIBRARIES_BYTES,
    )


def check_resources(source: ModelSource, target: Target, folder: Path) -> None:
    """Refuse a build that will not fit.

    Raises:
        InputError: too little disk where ``folder`` will be.
        DeviceMemoryError: too little memory.
    """
    needs = estimate(source, target)
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needs.peak_disk_bytes:
        raise InputError(
            f"the build needs about {needs.peak_disk_bytes / 2**30:.1f} GiB of disk, "
            f"{free / 2**30:.1f} GiB are free",
            value=str(place),
            remedy="Make room (hcma-fast cache prune), or choose another folder with --out.",
        )
    available = psutil.virtual_memory().available
    if available < needs.memory_bytes:
        raise DeviceMemoryError(
            f"the build needs about {needs.memory_bytes / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are free",
            remedy="Close other programs, or build on a larger machine.",
        )
