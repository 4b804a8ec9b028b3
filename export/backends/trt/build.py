"""ONNX to a TensorRT engine: one builder for the libraries ``tensorrt`` and ``tensorrt-rtx``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from hcma_fast.errors import (
    BackendError,
    DeviceMemoryError,
    EngineError,
    HcmaError,
    UsageError,
)
from hcma_fast.export.signature import check_signature
from hcma_fast.files import write_whole
from hcma_fast.specs import BATCH, IOSpec

TRTLibrary = Literal["tensorrt", "tensorrt-rtx"]
#: library -> its module, and the extra that installs it
_MODULES: dict[TRTLibrary, tuple[str, str]] = {
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
}
#: GPU architectures that can be named; ``tensorrt`` builds for the GPU that is there, and no other
ARCHITECTURES: dict[TRTLibrary, tuple[str, ...]] = {
    "tensorrt": (),
    "tensorrt-rtx": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "ATTENTION_OUTPUT")
_OUT_OF_MEMORY = re.compile(r"OutOfMemory|out of memory|bad_alloc|cudaError 2\b", re.IGNORECASE)
#: 35: no driver or too old a one; 100: no GPU
_NO_DRIVER = re.compile(r"cudaError (35|100)\b")
_log = logging.getLogger("hcma_fast")


@dataclass(frozen=True)
class TRTOptions:
    """How to build.

    Args:
        architectures: GPUs to build for, see :data:`ARCHITECTURES`; empty for the one that is here.
        workspace_mib: most memory that one layer may use as scratch; None for the library's limit.
        strip_weights: leave out the weights that the ONNX file has, to be put back at load; needs a
            CUDA driver where the engine is built.
        timing_cache: file in which ``tensorrt`` keeps measured kernels; TensorRT-RTX measures none.
        optimization_level: 0 (fast build) to 5 (fast engine); None for the library's, which is 3.
        tf32: let float32 products round their inputs to 10 bits, which no float32 parity allows.

    Raises UsageError or BackendError for what is out of range, or not in the library.
    """

    library: TRTLibrary
    architectures: tuple[str, ...] = ()
    workspace_mib: int | None = None
    strip_weights: bool = False
    timing_cache: Path | None = None
    optimization_level: int | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        check_architectures(self.library, self.architectures)
        mib, level = self.workspace_mib, self.optimization_level
        if mib is not None and mib < 1:
            raise UsageError("a workspace has 1 MiB or more", value=mib, remedy="Try 4096.")
        if level is not None and not 0 <= level <= 5:
            remedy = "Give 0 (fast build) to 5 (fast engine)."
            raise UsageError("this is not an optimization level", value=level, remedy=remedy)
        if self.timing_cache is not None and self.library == "tensorrt-rtx":
            raise UsageError(
                "tensorrt-rtx has no timing cache: it picks kernels on the GPU that runs them",
                remedy="Leave it out; the engine takes a runtime cache when it loads.",
            )


class TRTReport(BaseModel):
    """What was built. The counts are of the parsed network: the engine fuses its layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    library: TRTLibrary
    version: str
    architectures: tuple[str, ...] = Field(description="GPUs that the engine is for, if known")
    size_bytes: int = Field(ge=0)
    stripped: bool
    user_allocation: bool = Field(
        False, description="built to allocate nothing when it runs, as a CUDA graph needs it"
    )
    seconds: float = Field(ge=0)
    network_layers: int = Field(ge=0)
    network_dtypes: dict[str, int] = Field(description="layers by their first output's dtype")
    network_product_dtypes: dict[str, int] = Field(description="convolutions and products alone")


def trt_module(library: TRTLibrary) -> Any:
    """The library's Python module.

    Raises:
        BackendError: it is not installed, or cannot be loaded.
    """
    module, extra = _MODULES[library]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"the library {library} is not installed, or cannot be loaded",
            value=str(error)[:300],
            remedy=f'Run pip install "hcma-fast[{extra}]".',
        ) from error


def trt_version(library: TRTLibrary) -> str:
    """Version of the installed library; raises as :func:`trt_module`."""
    return str(trt_module(library).__version__)


def check_architectures(library: TRTLibrary, names: Sequence[str]) -> None:
    """Whether the library builds for these GPUs; no name at all means the GPU that is here.

    Raises:
        UsageError: a name twice, or not the name of an architecture.
        BackendError: the library does not build for it.
    """
    possible = ARCHITECTURES[library]
    remedy = f"It builds for {', '.join(possible)}; for data-centre GPUs use tensorrt."
    if not possible:
        remedy = "It builds for the GPU of this machine: leave --gpu-arch out, or use tensorrt-rtx."
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError("a GPU is named twice", value=name, remedy="Name each one once.")
        if not re.fullmatch(r"sm[1-9][0-9]{1,2}", name):
            raise UsageError("this is no architecture such as sm89", value=name, remedy=remedy)
        if name not in possible:
            what = f"{library} cannot build for a GPU by this name"
            raise BackendError(what, value=name, remedy=remedy)


def build_trt(onnx_path: Path, spec: IOSpec, engine_path: Path, options: TRTOptions) -> TRTReport:
    """Compile the graph at ``onnx_path`` to ``engine_path``, whole or not at all.

    The precision is that of the ONNX (networks are strongly typed), the batch range ``spec.batch``.

    Raises:
        BackendError: the library is missing, or what was asked needs a GPU that is not here.
        EngineError: the library cannot read or compile the graph, or it is not the spec's.
        DeviceMemoryError: host or GPU has no memory left.
        OutputError: the engine or the timing cache cannot be written.
    """
    started = time.monotonic()
    trt, log = trt_module(options.library), trt_log(options.library)
    what = f"TensorRT cannot compile {spec.graph}"
    with typed_errors(log, what) as errors:
        builder = trt.Builder(log)
        network = builder.create_network(0)
        # it owns the weights that the network points to: keep it until the engine is built
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(onnx_path)):
            heard = [*parser_errors(parser), *errors]
            raise trt_failure(f"TensorRT cannot read {spec.graph}", heard, value=str(onnx_path))
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        check_signature(
            spec,
            *(
                {t.name: (tuple(t.shape), dtype_name(t.dtype)) for t in tensors}
                for tensors in (inputs, outputs)
            ),
            ordered=False,
        )
        layers, products = _prepare_layers(trt, network)
        config = builder.create_builder_config()
        _configure(trt, config, options)
        if any(-1 in tuple(t.shape) for t in inputs):
            config.add_optimization_profile(_profile(builder, spec))
        cache = _load_timing_cache(config, options.timing_cache)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise _build_failure(what, errors, options)
    if cache is not None and options.timing_cache is not None:
        measured = cache.serialize()
        write_whole(options.timing_cache, lambda file: file.write(measured))
    write_whole(engine_path, lambda file: file.write(engine))
    return TRTReport(
        library=options.library,
        version=trt_version(options.library),
        architectures=options.architectures or _gpu_here(),
        size_bytes=engine.nbytes,
        stripped=options.strip_weights,
        user_allocation=options.library == "tensorrt-rtx",
        seconds=round(time.monotonic() - started, 2),
        network_layers=layers.total(),
        network_dtypes=dict(layers),
        network_product_dtypes=dict(products),
    )


def dtype_name(dtype: Any) -> str:
    """A TensorRT ``DataType`` as torch names it."""
    return _DTYPES.get(dtype.name, str(dtype.name).lower())


def _prepare_layers(trt: Any, network: Any) -> tuple[Counter[str], Counter[str]]:
    """Let attention be built where no fused kernel fits; count layers, and products, by dtype."""
    layers: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            # the binding gives the base class; NVIDIA's own samples cast like this
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
        if layer.num_outputs:
            dtype = dtype_name(layer.get_output(0).dtype)
            layers[dtype] += 1
            products[dtype] += layer.type.name in _PRODUCTS
    return layers, +products


def _configure(trt: Any, config: Any, options: TRTOptions) -> None:
    if options.library == "tensorrt-rtx":
        # none at all would mean every GPU from Ampere on, which nobody asked for
        names = [name.upper() for name in options.architectures] or ["CURRENT"]
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            done = config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
            assert done, f"{name} was checked before"
        # a run that allocates memory cannot be captured as a CUDA graph; tensorrt's do not
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def _profile(builder: Any, spec: IOSpec) -> Any:
    """The batch range as TensorRT takes it: three shapes for each input."""
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        shapes = [
            tuple(batch if size == BATCH else size for size in tensor.shape)
            for batch in (spec.batch.min, spec.batch.opt, spec.batch.max)
        ]
        profile.set_shape(tensor.name, *shapes)
    return profile


def _load_timing_cache(config: Any, path: Path | None) -> Any:
    """A timing cache for ``config``, from its file if that can be used; None if none is wanted."""
    if path is None:
        return None
    kept = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(kept)
    # False: a cache from another GPU, or of another version, is refused
    if cache is None or not config.set_timing_cache(cache, False):
        _log.warning("The timing cache %s is of another GPU or version: it is measured anew.", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _build_failure(what: str, errors: Sequence[str], options: TRTOptions) -> HcmaError:
    # stripping compiles what will put the weights back, and needs CUDA for that
    if options.strip_weights and "graph_jit.cpp" in "".join(errors):
        remedy = "Build where there is an NVIDIA GPU, or leave the weights in."
        return BackendError(f"{what} without its weights: no NVIDIA GPU", remedy=remedy)
    remedy = "Build where there is an NVIDIA GPU"
    if possible := ", ".join(ARCHITECTURES[options.library]):
        remedy += f", or name one: --gpu-arch {possible}"
    return trt_failure(what, errors, no_driver=f"{remedy}.")


def trt_failure(
    what: str,
    errors: Sequence[str],
    *,
    value: object = None,
    remedy: str = "The library may not support this graph, or its precision, on that GPU.",
    no_driver: str = "Install NVIDIA's driver; hcma-fast doctor shows what is there.",
) -> HcmaError:
    """The error to raise for what the library said, earliest message first."""
    text = " ".join(errors)
    if _OUT_OF_MEMORY.search(text):
        free = "Use a smaller batch range, or free memory."
        return DeviceMemoryError(f"{what}: out of memory", value=value, remedy=free)
    reason = " ".join(errors[0].split())[:300] if errors else "it gives no reason"
    if _NO_DRIVER.search(reason):
        lacking = "no NVIDIA GPU with a recent driver"
        return BackendError(f"{what}: {lacking}", value=value, remedy=no_driver)
    return EngineError(f"{what}: {reason}", value=value, remedy=remedy)


def parser_errors(parser: Any) -> list[str]:
    """What an ONNX parser, or a refitter that reads ONNX, complains about, with its nodes."""
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    return [f"{e.node_operator()} {e.node_name()}: {e.desc()}".strip(" :") for e in found]


@functools.cache
def trt_log(library: TRTLibrary) -> Any:
    """The library's logger, one for the process: TensorRT keeps the first that it is given.

    Its warnings go to our log as such, all else, errors too (they are raised), as debug messages.
    """
    trt = trt_module(library)
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.listeners: dict[int, list[str]] = {}

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                for heard in [*self.listeners.values()]:
                    heard.append(message)
            # a reminder at every int64 input; the signature is checked
            loud = level == severity.WARNING and "Int64 binding" not in message
            _log.log(logging.WARNING if loud else logging.DEBUG, "%s: %s", library, message)

    return Log()


@contextlib.contextmanager
def typed_errors(log: Any, what: str) -> Iterator[list[str]]:
    """The errors that the library logs meanwhile, in any thread; what it raises becomes ours."""
    errors: list[str] = []
    log.listeners[id(errors)] = errors
    try:
        yield errors
    except (RuntimeError, TypeError, MemoryError) as error:
        # a constructor that fails where CUDA is missing; any other TypeError is a fault of ours
        if isinstance(error, TypeError) and "pybind11::init" not in str(error):
            raise
        reason = "out of memory" if isinstance(error, MemoryError) else str(error)
        raise trt_failure(what, [*errors, reason]) from error
    finally:
        del log.listeners[id(errors)]


def _gpu_here() -> tuple[str, ...]:
    """The GPU that torch sees; empty with a torch that has no CUDA."""
    here = torch.cuda.is_available()
    return ("sm{}{}".format(*torch.cuda.get_device_capability()),) if here else ()
