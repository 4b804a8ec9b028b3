"""The Triton kernels without a GPU: registers, spills, shared memory and bytes, per architecture.

Every kernel is compiled to machine code by Triton and ptxas with the very launch that
:mod:`hcma_fast.kernels` would make at the sizes of ``sd14``. Nothing is run and nothing is timed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.errors import BackendError, UsageError
from hcma_fast.kernels import align_update, cosine_loss, denoise_update, launch, region_pool
from hcma_fast.specs import HISTORY, PLAN_COLUMNS

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DTYPES = ("float16", "bfloat16", "float32")
MAX_BYTES_RATIO = 1.1
"""Bytes that a kernel asks for, by the least that it could: the goal."""

_WIDTH, _TEXT_WIDTH, _CELLS, _LATENT = 512, 768, 256, (4, 64, 64)
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


class KernelRow(BaseModel):
    """One kernel, compiled for one architecture and one dtype."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: str
    arch: int
    """compute capability, 90 for sm_90"""
    dtype: str
    registers: int
    """per thread"""
    warps: int
    """per program"""
    spill_bytes: int
    """stores and loads; the goal is 0"""
    shared_bytes: int
    """per program"""
    bytes_moved: int
    """what the launch asks of the memory, caches included"""
    bytes_minimum: int
    """each input read once, each output written once"""

    @property
    def bytes_ratio(self) -> float:
        return self.bytes_moved / self.bytes_minimum


class KernelReport(BaseModel):
    """What :func:`offline_table` found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[KernelRow, ...]
    batch: int
    versions: dict[str, str]
    date: str


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch."""

    moved: int
    minimum: int


Case = Callable[[torch.dtype, int], tuple[launch.Launch, Traffic]]
"""From dtype and batch to a launch on tensors without data, and its bytes."""


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def cosine_case(
    dtype: torch.dtype, batch: int, boxes: int = MAX_OBJECTS, width: int = _TEXT_WIDTH
) -> tuple[launch.Launch, Traffic]:
    """All boxes valid; with fewer, fewer are read."""
    f_global, caption = (_tensor(batch, width, dtype=dtype) for _ in range(2))
    f_local, labels = (_tensor(batch, boxes, width, dtype=dtype) for _ in range(2))
    mask, lambdas = _tensor(batch, boxes), _tensor(2)
    inputs = (f_global, caption, f_local, labels, mask, lambdas)
    made, outputs = cosine_loss.cosine_loss_launch(*inputs)
    minimum = _bytes(*inputs, *outputs)
    # the mask is read to be counted, and again row by row
    return made, Traffic(minimum + _bytes(mask) + (batch - 1) * _bytes(lambdas), minimum)


def pool_case(
    dtype: torch.dtype,
    batch: int,
    boxes: int = MAX_OBJECTS,
    cells: int = _CELLS,
    width: int = _WIDTH,
) -> tuple[launch.Launch, Traffic]:
    """Regions in the dtype of the features."""
    local = _tensor(batch, cells, width, dtype=dtype)
    regions = _tensor(batch, boxes, cells, dtype=dtype)
    made, outputs = region_pool.region_pool_launch(local, regions)
    minimum = _bytes(local, regions, *outputs)
    return made, Traffic(minimum + (made.grid[0] - 1) * _bytes(regions), minimum)


def pool_backward_case(
    dtype: torch.dtype,
    batch: int,
    boxes: int = MAX_OBJECTS,
    cells: int = _CELLS,
    width: int = _WIDTH,
) -> tuple[launch.Launch, Traffic]:
    """Regions in the dtype of the gradient."""
    grad = _tensor(batch, boxes, width, dtype=dtype)
    regions, total = _tensor(batch, boxes, cells, dtype=dtype), _tensor(batch, boxes)
    made, output = region_pool.region_pool_backward_launch(grad, regions, total)
    minimum = _bytes(grad, regions, total, output)
    return made, Traffic(minimum + (made.grid[0] - 1) * _bytes(regions, total), minimum)


def denoise_case(
    dtype: torch.dtype, batch: int, latent: Sequence[int] = _LATENT
) -> tuple[launch.Launch, Traffic]:
    """With guidance and a full history; the latent and its history are float32."""
    z, stored = _tensor(batch, *latent), _tensor(batch, *latent)
    history = _tensor(batch, HISTORY, *latent)
    eps_uncond, eps_cond = (_tensor(batch, *latent, dtype=dtype) for _ in range(2))
    plan, step = _tensor(1, 51, PLAN_COLUMNS), _tensor(1, dtype=torch.int64)
    made = denoise_update.denoise_update_launch(
        z, stored, history, eps_uncond, eps_cond, None, None, plan, step
    )
    # of the plan's columns, those that are not the alignment's, nor of move and noise
    row = _bytes(plan[0, 0, :18], step)
    # reads both predictions, history and latent; writes history, latent and stored latent
    latents = _bytes(eps_uncond, eps_cond, history, z, history, z, stored)
    return made, Traffic(latents + _programs(made) * row, latents + row)


def align_case(
    dtype: torch.dtype, batch: int, latent: Sequence[int] = _LATENT, *, normalized: bool = False
) -> tuple[launch.Launch, Traffic]:
    """A float32 latent, and the gradient in ``dtype``."""
    z, gradient = _tensor(batch, *latent), _tensor(batch, *latent, dtype=dtype)
    table, step = _tensor(1, 51), _tensor(1, dtype=torch.int64)
    made = align_update.align_update_launch(z, gradient, table, step, normalized, z)
    row = _bytes(table[0, 0], step)
    once = _bytes(z, gradient, z)
    # too large to be held between the norms and the update: read again
    again = _bytes(z, gradient) if normalized and not made.constants["HELD"] else 0
    return made, Traffic(once + again + _programs(made) * row, once + row)


def align_normalized_case(
    dtype: torch.dtype, batch: int, latent: Sequence[int] = _LATENT
) -> tuple[launch.Launch, Traffic]:
    """As :func:`align_case`, normalised."""
    return align_case(dtype, batch, latent, normalized=True)


CASES: dict[str, Case] = {
    "cosine_loss": cosine_case,
    "region_pool": pool_case,
    "region_pool_backward": pool_backward_case,
    "denoise_update": denoise_case,
    "align_update": align_case,
    "align_update_normalized": align_normalized_case,
}


def _programs(made: launch.Launch) -> int:
    return int(torch.tensor(made.grid).prod())


def offline_table(
    *,
    architectures: Iterable[int] = ARCHITECTURES,
    dtypes: Iterable[str] = DTYPES,
    kernels: Iterable[str] = tuple(CASES),
    batch: int = 1,
    progress: Callable[[str], None] | None = None,
) -> KernelReport:
    """Compile and count; about a minute for everything on one core, seconds from Triton's cache.

    Args:
        architectures: of ``ARCHITECTURES``; dtypes: of ``DTYPES``; kernels: of ``CASES``.
        progress: is told the name of each kernel before it is compiled.

    Raises:
        BackendError: Triton is missing, or interprets (TRITON_INTERPRET).
        UsageError: an unknown kernel, dtype or architecture.
    """
    architectures, dtypes, kernels = tuple(architectures), tuple(dtypes), tuple(kernels)
    for asked, known in ((architectures, ARCHITECTURES), (dtypes, DTYPES), (kernels, CASES)):
        for value in asked:
            if value not in known:
                raise UsageError(
                    "no kernel is compiled for this",
                    value=value,
                    remedy=f"Choose from {', '.join(map(str, known))}.",
                )
    rows = []
    for kernel in kernels:
        for name in dtypes:
            if progress is not None:
                progress(f"{kernel} {name}")
            made, traffic = CASES[kernel](getattr(torch, name), batch)
            rows += [_row(kernel, name, arch, made, traffic) for arch in architectures]
    return KernelReport(
        rows=tuple(rows),
        batch=batch,
        versions=_versions(architectures),
        date=datetime.now(UTC).date().isoformat(),
    )


def _row(kernel: str, dtype: str, arch: int, made: launch.Launch, traffic: Traffic) -> KernelRow:
    compiled = compile_launch(made, arch)
    registers, spills = _ptxas_report(compiled.asm["ptx"], arch)
    return KernelRow(
        kernel=kernel,
        arch=arch,
        dtype=dtype,
        registers=registers,
        warps=made.num_warps,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        bytes_moved=traffic.moved,
        bytes_minimum=traffic.minimum,
    )


def compile_launch(made: launch.Launch, arch: int) -> Any:
    """Triton's ``CompiledKernel`` of a launch, specialised as Triton does at the launch.

    Raises:
        BackendError: Triton is missing, or interprets (TRITON_INTERPRET).
    """
    if launch.triton is None or not hasattr(made.kernel, "cache_key"):
        raise BackendError(
            "kernels cannot be compiled: Triton is missing or TRITON_INTERPRET is set",
            remedy="Run pip install 'hcma-fast[gpu]' and unset TRITON_INTERPRET.",
        )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(made.constants), {}
    for position, name in enumerate(made.kernel.arg_names):
        value = made.arguments.get(name)
        if isinstance(value, Tensor):
            # torch's allocator aligns far beyond 16 bytes
            signature[name] = _POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif value is None or value == 1:
            signature[name] = "constexpr"
            constants.setdefault(name, 1)
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return launch.triton.compile(
        ASTSource(made.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": made.num_warps,
            "num_stages": made.num_stages,
            "enable_fp_fusion": launch.FP_FUSION,
        },
    )


def _ptxas(arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(arch).path)


def _ptxas_report(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and bytes of spills, from ptxas with the options that Triton gives it."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [_ptxas(arch), "-lineinfo", "-v", "--regAllocOptLevel=2"]
        done = subprocess.run(
            [*command, f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert registers is not None and spills is not None
    return int(registers[1]), int(spills[1]) + int(spills[2])


def _versions(architectures: Iterable[int]) -> dict[str, str]:
    found = {"torch": torch.__version__, "triton": str(launch.triton.__version__)}
    for tool in sorted({_ptxas(arch) for arch in architectures}):
        text = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, check=True, timeout=30
        ).stdout
        release = re.search(r"V[\d.]+", text)
        found[Path(tool).name] = release[0] if release else "unknown"
    return found


_PREFACE = f"""# The Triton kernels, compiled without a GPU

Written by `hcma-fast bench kernels --offline`. Nothing here was run or timed on a GPU: these are
the compiler's figures and counts of bytes.

Sizes are those of `sd14`: {MAX_OBJECTS} boxes, all valid, text width {_TEXT_WIDTH}, {_CELLS} cells
of width {_WIDTH}, a latent of {" x ".join(map(str, _LATENT))}. The dtype is that of features,
regions, noise predictions and gradient; the latent, its history and all scalars are float32, and so
are sums.

- The goal is no spills, and bytes within {MAX_BYTES_RATIO} times the minimum.
- Bytes moved are all that the kernel asks for, whether a cache answers or not; the tests count them
  in Triton's interpreter too. The minimum is each input once and each output once.
- `denoise_update` has guidance and a full history.
- `align_update_normalized` reads latent and gradient once up to {align_update.HELD} elements per
  image, which is a latent of 64 x 64; above that it reads them twice.
- sm_75 has no tensor-core products in Triton, so the half-precision pooling uses many registers.
"""


def kernels_markdown(report: KernelReport) -> str:
    """The report as a page of Markdown: registers and shared memory, then bytes."""
    architectures = sorted({row.arch for row in report.rows})
    by_kernel: dict[tuple[str, str], dict[int, KernelRow]] = {}
    for row in report.rows:
        by_kernel.setdefault((row.kernel, row.dtype), {})[row.arch] = row
    head = " | ".join(f"sm_{arch}" for arch in architectures)
    lines = [
        _PREFACE,
        "## Registers per thread / shared memory per program in bytes",
        "",
        f"| kernel | dtype | warps | {head} | bytes of spills |",
        "|---|---|---|" + "---|" * (len(architectures) + 1),
    ]
    for (kernel, dtype), rows in by_kernel.items():
        cells = " | ".join(
            f"{rows[arch].registers} / {rows[arch].shared_bytes}" for arch in architectures
        )
        spills = max(row.spill_bytes for row in rows.values())
        warps = next(iter(rows.values())).warps
        lines.append(f"| {kernel} | {dtype} | {warps} | {cells} | {spills} |")
    lines += [
        "",
        f"## Bytes at batch {report.batch}, the same on every architecture",
        "",
        "| kernel | dtype | moved | minimum | ratio |",
        "|---|---|---|---|---|",
    ]
    for (kernel, dtype), rows in by_kernel.items():
        row = next(iter(rows.values()))
        lines.append(
            f"| {kernel} | {dtype} | {row.bytes_moved} | {row.bytes_minimum} "
            f"| {row.bytes_ratio:.3f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join([*lines, "", f"{versions}; {report.date}.", ""])
