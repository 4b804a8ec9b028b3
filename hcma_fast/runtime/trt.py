"""TensorRT as an engine, for both of its libraries; torch's CUDA tensors are bound in place."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcma_fast.errors import (
    BackendError,
    DeviceMemoryError,
    EngineError,
    HcmaError,
    InputError,
    UsageError,
)
from hcma_fast.export.trt_engine import (
    TRTLibrary,
    check_signature,
    dtype_name,
    parser_errors,
    trt_failure,
    trt_log,
    trt_module,
    typed_errors,
    write_whole,
)
from hcma_fast.specs import BATCH, IOSpec, TensorSpec

_REBUILD = "Build it again, with this library's version and for this GPU: hcma-fast build --force."
_log = logging.getLogger("hcma_fast")
_DIGEST = hashlib.sha256().digest_size
"""Bytes before a runtime cache: the hash of the rest"""


class TRTEngine:
    """Runs one engine file on the GPU that is current when it is made.

    A call gives fresh outputs, which belong to the caller. For CUDA graphs use :meth:`bind` with
    buffers of your own, then :meth:`enqueue`, which neither allocates nor waits. Not for two
    threads or streams at once: they would share its scratch memory.

    Args:
        path: the engine file; read here, so check its hash before.
        weights_onnx: the ONNX file that a stripped engine was built from.
        runtime_cache: where TensorRT-RTX keeps the kernels that it compiles for this GPU; read if
            it is there, and written after the first call, and by :meth:`save_runtime_cache`.

    Raises:
        BackendError: the library, the driver, or torch's CUDA is missing.
        EngineError: the file is no engine for this version and GPU, or not of this ``spec``; its
            weights are missing, or not those of ``weights_onnx``.
        DeviceMemoryError: the GPU has no memory left.
        UsageError: a runtime cache for ``tensorrt``, which has none.
    """

    def __init__(
        self,
        path: Path,
        spec: IOSpec,
        library: TRTLibrary,
        *,
        weights_onnx: Path | None = None,
        runtime_cache: Path | None = None,
    ) -> None:
        if runtime_cache is not None and library != "tensorrt-rtx":
            raise UsageError(
                "tensorrt has no runtime cache: its kernels are in the engine",
                remedy="Leave it out, or use tensorrt-rtx.",
            )
        trt = trt_module(library)
        self.spec = spec
        self._library = library
        self._engine = load_engine(path, library)
        if not torch.cuda.is_available():
            raise BackendError(
                "this torch has no CUDA, which TensorRT's inputs and outputs need",
                remedy="Install a CUDA build of torch: see pytorch.org/get-started.",
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        check_signature(spec, {name: self._found(name) for name in names})
        self._check_range()
        if weights_onnx is not None:
            refit_trt(self._engine, weights_onnx, library)
        elif self._engine.get_engine_stat(trt.EngineStat.STRIPPED_WEIGHTS_SIZE) > 0:
            raise EngineError(
                f"the engine of {spec.graph} was built without its weights",
                value=str(path),
                remedy="Give the ONNX file that it was built from, or build it with weights.",
            )
        self._bound: tuple[Tensor, ...] = ()
        self._warm = False
        # set before the cache, and so destroyed before it: the cache must outlive its contexts
        self._context: Any = None
        self._cache: Any = None
        self._cache_path, self._cached = runtime_cache, b""
        self._context = self._create_context()

    @property
    def device_memory_bytes(self) -> int:
        """Scratch memory on the GPU, beside weights, inputs and outputs."""
        return int(self._engine.device_memory_size_v2)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.runtime.engine.Engine`. Runs on torch's current stream.

        Inputs that are not contiguous are copied. Buffers bound before are no longer bound after.

        Raises:
            InputError: an input is missing, or of another shape, dtype or device than the spec's.
            DeviceMemoryError: the GPU has no memory left.
            EngineError: TensorRT could not run.
        """
        names = [name for name in self.spec.input_names if name in inputs]
        given = {name: inputs[name].contiguous() for name in names}
        outputs = self.allocate(check_tensors(self.spec, self.spec.inputs, given, self.device))
        self.bind(given, outputs)
        try:
            self.enqueue()
        finally:
            # torch reuses freed memory in the order of the stream, so nothing need be kept
            self._bound = ()
        if not self._warm:
            self._warm = True
            self._keep_kernels()
        return outputs

    def fork(self) -> TRTEngine:
        """The same engine with a context of its own: a CUDA graph that captured one needs it as it
        was then.

        Raises:
            EngineError, DeviceMemoryError: there can be no second context.
        """
        twin = copy.copy(self)
        twin._bound, twin._warm, twin._context, twin._cache = (), False, None, None
        twin._context = twin._create_context()
        return twin

    def allocate(self, batch: int) -> dict[str, Tensor]:
        """Uninitialised outputs for this batch size, on the engine's device.

        Raises:
            DeviceMemoryError: the GPU has no memory left.
        """
        try:
            return {
                tensor.name: torch.empty(
                    _shape(tensor, batch), dtype=getattr(torch, tensor.dtype), device=self.device
                )
                for tensor in self.spec.outputs
            }
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"out of memory in the graph {self.spec.graph}",
                remedy="Generate fewer images at once.",
            ) from error

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Let the next :meth:`enqueue` read and write these tensors, by address.

        They stay the caller's, who may refill the inputs between calls; the engine holds on to them
        until the next ``bind`` or call. A CUDA graph that captured ``enqueue`` has their addresses
        for good: keep them as long as the graph.

        Raises:
            InputError: one is missing, not contiguous, or of another shape, dtype or device.
            EngineError: TensorRT refuses them.
        """
        spec = self.spec
        batch = check_tensors(spec, spec.inputs, inputs, self.device)
        if check_tensors(spec, spec.outputs, outputs, self.device) != batch:
            raise _wrong(spec, "the outputs have another batch size than the inputs", batch)
        tensors = {t.name: inputs[t.name] for t in spec.inputs}
        tensors |= {t.name: outputs[t.name] for t in spec.outputs}
        with self._errors() as errors:
            done = [
                self._context.set_input_shape(t.name, _shape(t, batch)) for t in spec.inputs
            ] + [
                self._context.set_tensor_address(name, tensor.data_ptr())
                for name, tensor in tensors.items()
            ]
            # a wrong guess at a size would be a write past the end of the caller's buffer
            shapes = [tuple(self._context.get_tensor_shape(t.name)) for t in spec.outputs]
            if not all(done) or shapes != [_shape(t, batch) for t in spec.outputs]:
                raise self._failure("refuses its tensors", errors)
        self._bound = tuple(tensors.values())

    def enqueue(self, stream: torch.cuda.Stream | None = None) -> None:
        """Run on the bound tensors, on ``stream`` or torch's current one, and do not wait.

        On the default stream TensorRT synchronises the device; prefer another where it matters.

        Raises:
            UsageError: nothing is bound.
            EngineError, DeviceMemoryError: TensorRT could not run.
        """
        if not self._bound:
            raise UsageError("no tensors are bound", remedy="Call bind() before enqueue().")
        stream = stream or torch.cuda.current_stream(self.device)
        with self._errors() as errors:
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise self._failure("did not run", errors)

    def save_runtime_cache(self) -> None:
        """Write what TensorRT-RTX compiled since it was loaded; call it after a warm-up.

        Raises:
            InputError: the file cannot be written.
        """
        if self._cache is None or self._cache_path is None:
            return
        compiled = bytes(self._cache.serialize())
        if compiled != self._cached:
            write_whole(hashlib.sha256(compiled).digest() + compiled, self._cache_path)
            self._cached = compiled

    def _keep_kernels(self) -> None:
        try:
            self.save_runtime_cache()
        except InputError as error:
            # the next process compiles them again; this one has its images to make
            _log.warning("The kernels compiled for this GPU are not kept. %s", error)

    def _create_context(self) -> Any:
        config = self._engine.create_runtime_config()
        if self._cache_path is not None:
            self._cache = config.create_runtime_cache()
            data = self._cache_path.read_bytes() if self._cache_path.is_file() else b""
            digest, kept = data[:_DIGEST], data[_DIGEST:]
            # the library is given nothing that was cut off or damaged
            if data and hashlib.sha256(kept).digest() == digest and self._cache.deserialize(kept):
                self._cached = kept
            elif data:
                _log.warning(
                    "The runtime cache %s is damaged, or of another GPU or version: kernels are "
                    "compiled anew.",
                    self._cache_path,
                )
            config.set_runtime_cache(self._cache)
        with self._errors() as errors:
            context = self._engine.create_execution_context(config)
            if context is None:
                raise self._failure("cannot start", errors)
        return context

    def _found(self, name: str) -> tuple[tuple[int, ...], str]:
        shape = tuple(self._engine.get_tensor_shape(name))
        return shape, dtype_name(self._engine.get_tensor_dtype(name))

    def _check_range(self) -> None:
        """Whether the engine takes all batch sizes of the spec."""
        batch = self.spec.batch
        for tensor in self.spec.inputs:
            if BATCH not in tensor.shape or -1 not in self._found(tensor.name)[0]:
                continue
            axis = tensor.shape.index(BATCH)
            low, _, high = self._engine.get_tensor_profile_shape(tensor.name, 0)
            if not low[axis] <= batch.min <= batch.max <= high[axis]:
                raise EngineError(
                    f"the engine of {self.spec.graph} is for other batch sizes than {batch}",
                    value=f"{low[axis]} to {high[axis]}",
                    remedy=_REBUILD,
                )

    def _errors(self) -> AbstractContextManager[list[str]]:
        return typed_errors(trt_log(self._library), f"the graph {self.spec.graph} failed")

    def _failure(self, problem: str, errors: list[str]) -> HcmaError:
        return trt_failure(f"the graph {self.spec.graph} {problem}", errors, remedy=_REBUILD)


def load_engine(path: Path, library: TRTLibrary) -> Any:
    """The file as an ``ICudaEngine``.

    Raises:
        BackendError: the library is missing, or there is no NVIDIA GPU with a recent driver.
        EngineError: the file cannot be read, or is no engine for this version and GPU.
        DeviceMemoryError: the GPU has no memory left.
    """
    trt, log = trt_module(library), trt_log(library)
    what = f"{library} cannot load this engine"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(what, value=str(path), remedy=_REBUILD) from error
    with typed_errors(log, what) as errors:
        engine = trt.Runtime(log).deserialize_cuda_engine(data)
        if engine is None:
            raise trt_failure(what, errors, value=str(path), remedy=_REBUILD)
    return engine


def refit_trt(engine: Any, onnx_path: Path, library: TRTLibrary) -> None:
    """Put the weights of the ONNX file into an engine that was built from it without them.

    Raises:
        EngineError: the file has not these weights, or the engine takes none.
        DeviceMemoryError: the GPU has no memory left.
    """
    trt, log = trt_module(library), trt_log(library)
    what, remedy = "the engine does not take these weights", "Give the ONNX that it was built from."
    with typed_errors(log, what) as errors:
        refitter = trt.Refitter(engine, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        read = parser.refit_from_file(str(onnx_path))
        lost = [f"it lacks {name}" for name in refitter.get_missing_weights()] if read else []
        if not read or lost or not refitter.refit_cuda_engine():
            heard = [*parser_errors(parser), *lost, *errors]
            raise trt_failure(what, heard, value=str(onnx_path), remedy=remedy)


def check_tensors(
    spec: IOSpec,
    expected: tuple[TensorSpec, ...],
    given: Mapping[str, Tensor],
    device: torch.device,
) -> int:
    """Batch size of ``given``, which TensorRT takes by address alone: all else is checked here.

    Raises:
        InputError: one is missing, not contiguous, or of another shape, dtype or device.
    """
    batch: int | None = None
    for tensor in expected:
        if tensor.name not in given:
            raise _wrong(spec, f"{tensor.name} is missing", ", ".join(given))
        found = given[tensor.name]
        if batch is None and BATCH in tensor.shape and found.ndim == len(tensor.shape):
            batch = found.shape[tensor.shape.index(BATCH)]
            if not spec.batch.min <= batch <= spec.batch.max:
                raise _wrong(spec, f"it takes batch sizes {spec.batch.min}-{spec.batch.max}", batch)
        wanted = (_shape(tensor, batch or 0), f"torch.{tensor.dtype}", device, True)
        actual = (tuple(found.shape), str(found.dtype), found.device, found.is_contiguous())
        if actual != wanted:
            raise _wrong(spec, f"{tensor.name} is not {_words(*wanted)}", _words(*actual))
    if batch is None:
        raise _wrong(spec, "no tensor has a batch size", ", ".join(given))
    return batch


def _words(shape: tuple[int, ...], dtype: str, device: torch.device, contiguous: bool) -> str:
    return f"{dtype} {shape} on {device}{'' if contiguous else ', not contiguous'}"


def _shape(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(batch if isinstance(size, str) else size for size in tensor.shape)


def _wrong(spec: IOSpec, problem: str, value: object) -> InputError:
    return InputError(
        f"wrong tensors for the graph {spec.graph}: {problem}",
        value=value,
        remedy="hcma_fast.specs has the shapes; a wider batch range needs another build.",
    )
