"""One graph compiled to native code ahead of time, by AOTInductor: a .pt2 file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hcma_fast.errors import BackendError, EngineError, InputError
from hcma_fast.export.graphs import dynamic_shapes, example_inputs, traceable
from hcma_fast.specs import BATCH, IOSpec, TensorSpec

TARGET_KEY = "HCMA_TARGET"
"""Entry of the file's metadata that holds :func:`target`."""


def target(device: str = "cpu") -> str:
    """What native code compiled here runs on: machine, its vector instructions, torch."""
    parts = [platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_flags()]
    parts.append(str(torch.__version__))
    if device != "cpu":
        parts.append("sm_{}{}".format(*torch.cuda.get_device_capability(device)))
    return " ".join(parts)


def _cpu_flags() -> str:
    """Of the CPU's instructions, all of which the compiler may use, a hash."""
    flags = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:12]


def compile_aoti(spec: IOSpec, module: nn.Module, path: Path, *, device: str = "cpu") -> None:
    """Compile ``module`` with its weights into the file ``path``, which ends in .pt2.

    The code is made for the CPU of this machine: see :func:`target`.

    Args:
        spec: names and shapes; one graph serves every batch, unless the spec's batch is static.
        module: on ``device``; takes the inputs in the spec's order, returns a tuple of outputs.

    Raises:
        BackendError: there is no C++ compiler.
    """
    check_compiler()
    example = tuple(value.to(device) for value in example_inputs(spec))
    with torch.no_grad():
        program = torch.export.export(
            _plain(spec, module, example), example, dynamic_shapes=dynamic_shapes(spec)
        )
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            partial = Path(folder) / path.name
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(partial),
                inductor_configs={
                    # the number of threads is the user's of that day, not the builder's
                    "cpp.dynamic_threads": True,
                    "aot_inductor.metadata": {TARGET_KEY: target(device)},
                },
            )
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)


def runner(path: Path, spec: IOSpec) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function that runs the file at ``path`` on tensors of its device.

    Loading runs native code from the file, so the caller must have compared its sha256 with the
    manifest's before. Inputs are read where they lie; outputs are new tensors, the caller's. The
    function raises InputError for tensors unlike the spec, since the native code trusts them.

    Raises:
        EngineError: the file cannot be read, or was compiled for another CPU, GPU or torch, whose
            instructions could end this process.
    """
    _check_target(path)
    try:
        model = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise _unreadable(path, str(error)) from error

    @torch.no_grad()
    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        args = [inputs[name].contiguous() for name in spec.input_names]
        _check_inputs(spec, args)
        return dict(zip(spec.output_names, model(*args), strict=True))

    return run


def _plain(spec: IOSpec, module: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """``module`` as operators alone, without the questions that its Python code asks.

    diffusers' upsampling asks if the batch is 64 or more, on which torch.export would insist.
    """
    traced = traceable(spec.graph, module, example)
    if isinstance(traced, fx.GraphModule):
        return traced
    traced = make_fx(traced, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def check_compiler() -> None:
    """Raises BackendError where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BackendError(
            "the backend torch-compile found no C++ compiler",
            remedy="Install g++ (Debian and Ubuntu: apt install g++), or set CXX to a compiler.",
        ) from error


def _check_inputs(spec: IOSpec, args: list[Tensor]) -> None:
    batches = set()
    for tensor, value in zip(spec.inputs, args, strict=True):
        if not _fits(tensor, value):
            raise InputError(
                f"the graph {spec.graph} takes {tensor.name} as {tensor.shape} {tensor.dtype}",
                value=f"{tuple(value.shape)} {value.dtype}",
                remedy="Give every input the shape and dtype of the spec.",
            )
        if BATCH in tensor.shape:
            batches.add(value.shape[tensor.shape.index(BATCH)])
    allowed = spec.batch
    if len(batches) != 1 or not allowed.min <= next(iter(batches)) <= allowed.max:
        raise InputError(
            f"the graph {spec.graph} takes one batch size for all inputs, of {allowed}",
            value=sorted(batches),
            remedy="Generate another number of images at once.",
        )


def _fits(tensor: TensorSpec, value: Tensor) -> bool:
    return (
        value.dtype == getattr(torch, tensor.dtype)
        and value.dim() == len(tensor.shape)
        and all(size in (BATCH, n) for size, n in zip(tensor.shape, value.shape, strict=True))
    )


def _check_target(path: Path) -> None:
    """Read what the file was compiled for, and nothing else of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("wrapper_metadata.json"))
            metadata = json.loads(archive.read(name))
        compiled_for, device = metadata[TARGET_KEY], metadata["AOTI_DEVICE_KEY"]
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, KeyError) as error:
        raise _unreadable(path, repr(error)) from error
    here = "no GPU" if device != "cpu" and not torch.cuda.is_available() else target(device)
    if compiled_for != here:
        raise EngineError(
            f"this engine was compiled for another machine or torch than this one ({here})",
            value=compiled_for,
            remedy="Build it again: hcma-fast build --force.",
        )


def _unreadable(path: Path, reason: str) -> EngineError:
    return EngineError(
        f"torch cannot load this engine ({reason.splitlines()[0][:200]})",
        value=str(path),
        remedy="Build it again: hcma-fast build --force.",
    )
