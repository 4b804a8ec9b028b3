"""One graph compiled to native code by AOTInductor, for a CPU or a GPU: a .pt2 file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hcma_fast.errors import BackendError, DeviceMemoryError, EngineError, InputError
from hcma_fast.export.channels_last import channels_last
from hcma_fast.export.onnx.trace import dynamic_shapes, example_inputs, traceable
from hcma_fast.export.signature import Tensors, check_signature
from hcma_fast.specs import BATCH, IOSpec, TensorSpec

_launching = threading.Lock()
_ALIGNED = 16
"""Bytes that the addresses of a GPU's inputs are multiples of"""
TARGET_KEY = "HCMA_TARGET"
"""Entry of the file's metadata that holds :func:`target`."""
SIGNATURE_KEY = "HCMA_SIGNATURE"
"""Entry of the file's metadata that holds the graph's inputs and outputs as JSON. AOTInductor's own
names no tensor, and the code takes them by position."""


def target(device: str = "cpu") -> str:
    """What native code compiled here runs on: machine, its vector instructions, torch, its GPU."""
    parts = [platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_flags()]
    parts.append(str(torch.__version__))
    if device != "cpu":
        gpu = torch.cuda.is_available()
        parts.append("sm_{}{}".format(*torch.cuda.get_device_capability()) if gpu else "no GPU")
    return " ".join(parts)


def _cpu_flags() -> str:
    """Of the CPU's instructions, all of which the compiler may use, a hash."""
    flags = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:12]


Tuning = Literal["default", "autotune"]
TUNINGS: dict[Tuning, dict[str, bool]] = {
    "default": {},
    # products and 1 x 1 convolutions by the fastest of several kernels, and these searched further
    "autotune": {
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "epilogue_fusion": True,
        "conv_1x1_as_mm": True,
    },
}
"""Inductor's options for a GPU; "autotune" times kernels while it builds, for minutes a graph"""


def compile_aoti(
    spec: IOSpec,
    module: nn.Module,
    path: Path,
    *,
    device: str = "cpu",
    tuning: Tuning = "default",
) -> None:
    """Compile ``module`` with its weights into the file ``path``, which ends in .pt2.

    The code is made for the CPU of this machine, or for torch's current GPU: see :func:`target`.

    Args:
        spec: names and shapes; one graph serves every batch, unless the spec's batch is static.
        module: takes the inputs in the spec's order, returns a tuple of outputs.
        device: "cpu", or "cuda", where a copy of ``module`` is compiled, with its channels last.
        tuning: of :data:`TUNINGS`.

    Raises:
        BackendError: there is no C++ compiler; for a GPU also no GPU, Triton or CUDA toolkit.
        DeviceMemoryError: the GPU has no memory left.
    """
    check_compiler(device)
    with torch.no_grad(), _memory_errors(spec):
        if device != "cpu":
            # the weights of the module itself are those of other graphs too
            module = channels_last(copy.deepcopy(module).to(device))
        example = tuple(value.to(device) for value in example_inputs(spec))
        program = export_program(spec, module, example)
        tensors = _tensors(spec, program)
        check_signature(spec, *tensors)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            partial = Path(folder) / path.name
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(partial),
                inductor_configs={
                    # the number of threads is the user's of that day, not the builder's
                    "cpp.dynamic_threads": True,
                    "aot_inductor.metadata": {
                        TARGET_KEY: target(device),
                        SIGNATURE_KEY: json.dumps(tensors),
                    },
                    # whose allocator counts its failures, and shares what it has kept
                    "aot_inductor.weight_use_caching_allocator": device != "cpu",
                    **TUNINGS[tuning],
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

    On a GPU it runs on torch's current stream, and a CUDA graph can hold what it does, from its
    second run on: the first one loads kernels and folds constants.

    Raises:
        EngineError: the file cannot be read, has other inputs or outputs than ``spec``, or was
            compiled for another CPU, GPU or torch, whose instructions could end this process.
        DeviceMemoryError: the GPU has no memory left.
    """
    device = _check_metadata(path, spec)
    on_gpu = device.type == "cuda"
    # Otherwise than single-threaded, the model's container records an event after each run, and
    # queries it before the next, or waits for it (torch's aoti_runtime/model_container.h). A
    # capture forbids both, and without one the host would wait. What threads must not do at once
    # is the first run, which loads the kernels: so the host's part of a run, the launches, is one
    # thread's at a time. A run leaves nothing in the model but that: its temporaries and outputs
    # are from torch's allocator, for torch's stream, and the weights stay where they are. So batch
    # sizes, streams and CUDA graphs share one model, where TensorRT needs a context for each.
    misses = gpu_misses()
    try:
        model = torch._inductor.aoti_load_package(str(path), run_single_threaded=on_gpu)
    except RuntimeError as error:
        if gpu_misses() > misses:
            raise DeviceMemoryError(
                f"out of memory for the weights of the graph {spec.graph}",
                value=f"{path.stat().st_size / 2**20:.0f} MiB",
                remedy="Close what else uses the GPU.",
            ) from error
        raise _unreadable(path, str(error)) from error

    @torch.no_grad()
    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        args = [inputs[name].contiguous() for name in spec.input_names]
        _check_inputs(spec, args, device)
        if not on_gpu:
            outputs = model(*args)
        else:
            # a row of a table may lie anywhere, and the code would copy it with a warning
            args = [value.clone() if value.data_ptr() % _ALIGNED else value for value in args]
            with _launching, _exact_products():
                outputs = model(*args)
        return dict(zip(spec.output_names, outputs, strict=True))

    return run


def gpu_misses() -> int:
    """How often torch's allocator found no memory on the current GPU; 0 without one.

    AOTInductor's errors name the call that failed, and not why. To be looked up around a load and
    after an error: it takes longer than a launch.
    """
    return int(torch.cuda.memory_stats().get("num_ooms", 0))


@contextmanager
def _exact_products() -> Iterator[None]:
    """float32 convolutions as float32: by torch's default cuDNN rounds their inputs to TF32.

    That is torch's setting when a convolution is launched, not when it is compiled, and the whole
    process's: hence one lock for all engines. Matrix products keep the user's setting, which is
    exact by default.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@contextmanager
def _memory_errors(spec: IOSpec) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"out of memory on the GPU while the graph {spec.graph} was compiled",
            remedy="Close what else uses the GPU.",
        ) from error


def export_program(
    spec: IOSpec, module: nn.Module, example: tuple[Tensor, ...]
) -> torch.export.ExportedProgram:
    """The graph as AOTInductor takes it, traced with ``example`` on the module's device."""
    # A GPU's kernels index by 32 bits where the largest batch allows it, so it must be the true
    # one; a CPU's always index by 64.
    most = None if example[0].device.type == "cpu" else spec.batch.max
    shapes = dynamic_shapes(spec, most)
    return torch.export.export(_plain(spec, module, example), example, dynamic_shapes=shapes)


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


def check_compiler(device: str = "cpu") -> None:
    """Raises BackendError where :func:`compile_aoti` lacks a compiler, or anything for a GPU."""
    if device != "cpu":
        _check_gpu_tools()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BackendError(
            "the backend torch-compile found no C++ compiler",
            remedy="Install g++ (Debian and Ubuntu: apt install g++), or set CXX to a compiler.",
        ) from error


def _check_gpu_tools() -> None:
    """For a GPU torch also needs the GPU itself, Triton and CUDA's headers."""
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.cuda.is_available():
        problem = "builds for the GPU that is here, and torch finds none"
        remedy = "Build on the GPU's machine, or for a CPU: --device cpu."
    elif find_spec("triton") is None:
        problem, remedy = "needs Triton for a GPU", 'Run pip install "hcma-fast[gpu]".'
    elif CUDA_HOME is None or not any(
        # conda's are below the name of the machine
        Path(CUDA_HOME, folder, "cuda.h").is_file()
        for folder in ("include", f"targets/{platform.machine()}-linux/include")
    ):
        problem = f"found no CUDA toolkit with its headers (CUDA_HOME is {CUDA_HOME or 'not set'})"
        remedy = f"Install the toolkit of CUDA {torch.version.cuda}, or set CUDA_HOME to it."
    else:
        return
    raise BackendError(f"the backend torch-compile {problem}", remedy=remedy)


def _check_inputs(spec: IOSpec, args: list[Tensor], device: torch.device) -> None:
    batches = set()
    for tensor, value in zip(spec.inputs, args, strict=True):
        if not _fits(tensor, value) or value.device != device:
            raise InputError(
                f"the graph {spec.graph} takes {tensor.name} as {tensor.shape} {tensor.dtype} on "
                f"{device}",
                value=f"{tuple(value.shape)} {value.dtype} on {value.device}",
                remedy="Give every input the shape and dtype of the spec, on the engine's device.",
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


def _tensors(spec: IOSpec, program: torch.export.ExportedProgram) -> tuple[Tensors, Tensors]:
    """The program's inputs and outputs, by the spec's names and in its order."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    signature = program.graph_signature

    def described(tensors: tuple[TensorSpec, ...], names: Sequence[Any]) -> Tensors:
        found = {}
        for tensor, name in zip(tensors, names, strict=True):
            shape = tuple(n if isinstance(n, int) else -1 for n in values[name].shape)
            found[tensor.name] = (shape, str(values[name].dtype).removeprefix("torch."))
        return found

    return (
        described(spec.inputs, signature.user_inputs),
        described(spec.outputs, signature.user_outputs),
    )


def _check_metadata(path: Path, spec: IOSpec) -> torch.device:
    """Read what the file was compiled for, and nothing else of it: where it will run."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("wrapper_metadata.json"))
            metadata = json.loads(archive.read(name))
        compiled_for, device = metadata[TARGET_KEY], metadata["AOTI_DEVICE_KEY"]
        inputs, outputs = (
            {name: (tuple(shape), dtype) for name, (shape, dtype) in tensors.items()}
            for tensors in json.loads(metadata[SIGNATURE_KEY])
        )
    except (
        *(OSError, zipfile.BadZipFile, StopIteration),
        *(ValueError, KeyError, TypeError, AttributeError),
    ) as error:
        raise _unreadable(path, repr(error)) from error
    check_signature(spec, inputs, outputs)
    here = target(device)
    if compiled_for != here:
        raise EngineError(
            f"this engine was compiled for another machine or torch than this one ({here})",
            value=compiled_for,
            remedy="Build it again: hcma-fast build --force.",
        )
    # the model is loaded onto the current GPU, and stays there
    return torch.device(device if device == "cpu" else f"{device}:{torch.cuda.current_device()}")


def _unreadable(path: Path, reason: str) -> EngineError:
    return EngineError(
        f"torch cannot load this engine ({reason.splitlines()[0][:200]})",
        value=str(path),
        remedy="Build it again: hcma-fast build --force.",
    )
