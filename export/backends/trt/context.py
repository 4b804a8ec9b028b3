"""One execution context of a TensorRT engine: its batch size, scratch memory and kernels."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcma_fast.errors import DeviceMemoryError, HcmaError, OutputError, UsageError
from hcma_fast.export.backends.trt.build import (
    TRTLibrary,
    trt_failure,
    trt_log,
    trt_module,
    typed_errors,
)
from hcma_fast.files import write_whole
from hcma_fast.specs import IOSpec, TensorSpec

REBUILD = "Build it again, with this library's version and for this GPU: hcma-fast build --force."
_DIGEST = hashlib.sha256().digest_size
"""Bytes before a runtime cache: the hash of the rest"""
_LEAST_SCRATCH = 256
"""Bytes: an engine that needs scratch for some batch refuses to run another without any"""
_log = logging.getLogger("hcma_fast")


class TRTContext:
    """What an engine holds for the batch that it runs.

    Scratch memory is torch's, as much as the batch needs. It stays where it is until a larger batch
    comes, so a context that runs one batch size has it at one address.

    Args:
        engine: an ``ICudaEngine``.
        cache_path: where TensorRT-RTX keeps the kernels that it compiles for this GPU.
        captured: made for a CUDA graph. TensorRT-RTX then compiles the kernels of a batch size
            before it runs it first, where it would otherwise begin with others and replace them
            between two runs.

    Raises:
        EngineError, DeviceMemoryError: the library cannot start.
    """

    def __init__(
        self,
        engine: Any,
        spec: IOSpec,
        library: TRTLibrary,
        device: torch.device,
        cache_path: Path | None,
        *,
        captured: bool = False,
    ) -> None:
        self.device = device
        self.captured = captured
        #: the last one that was set; 0 before, or after a failure
        self.batch = 0
        self._engine, self._spec, self._library = engine, spec, library
        # destroyed in this order: the cache and the memory must outlive the context
        self._context: Any = None
        self._cache: Any = None
        self._scratch: Tensor | None = None
        self._cache_path, self._cached = cache_path, b""
        with self._errors() as errors:
            self._context = engine.create_execution_context(self._config(captured))
            if self._context is None:
                raise self._failure("cannot start", errors)

    def set_batch(self, batch: int) -> None:
        """Shapes and scratch memory of the next runs; the first time it may compile kernels.

        Raises:
            EngineError: the engine has other shapes than the spec.
            DeviceMemoryError: the GPU has no memory left.
            UsageError: a CUDA graph is being captured, which cannot hold an allocation.
        """
        if batch == self.batch:
            return
        if torch.cuda.is_current_stream_capturing():
            raise UsageError(
                "an engine's batch size cannot change while a CUDA graph is captured",
                value=f"{self._spec.graph}: {self.batch or 'none'} to {batch}",
                remedy="Run it once with this batch size before.",
            )
        self.batch = 0
        spec, context = self._spec, self._context
        with self._errors() as errors:
            done = [context.set_input_shape(t.name, shape_of(t, batch)) for t in spec.inputs]
            # a wrong guess at a size would be a write past the end of the caller's buffer
            shapes = [tuple(context.get_tensor_shape(t.name)) for t in spec.outputs]
            if not all(done) or shapes != [shape_of(t, batch) for t in spec.outputs]:
                raise self._failure("refuses its tensors", errors)
            needed = int(context.update_device_memory_size_for_shapes())
            if needed or self._engine.device_memory_size_v2:
                scratch = self._memory(max(needed, _LEAST_SCRATCH))
                context.set_device_memory(scratch.data_ptr(), scratch.numel())
                if errors:
                    raise self._failure("refuses its scratch memory", errors)
        self.batch = batch

    def set_addresses(self, tensors: Mapping[str, Tensor]) -> None:
        """Where the next runs read and write.

        Raises:
            EngineError: TensorRT refuses one.
        """
        with self._errors() as errors:
            done = [self._context.set_tensor_address(n, t.data_ptr()) for n, t in tensors.items()]
            if not all(done):
                raise self._failure("refuses its tensors", errors)

    def run(self, stream: int) -> None:
        """Put the work on the CUDA stream of this handle, and do not wait.

        Raises:
            EngineError, DeviceMemoryError: TensorRT could not run.
        """
        with self._errors() as errors:
            if not self._context.execute_async_v3(stream):
                raise self._failure("did not run", errors)

    def is_capturable(self, stream: int) -> bool:
        """Whether a CUDA graph can hold a run, by the library's own word.

        Set a batch before, and ask for a stream other than the default one, which none can capture.
        """
        rtx = self._library == "tensorrt-rtx"
        return not rtx or bool(self._context.is_stream_capturable(stream))

    def save_kernels(self) -> None:
        """Write what TensorRT-RTX compiled since it was loaded, if there is a place for it.

        Raises:
            OutputError: the file cannot be written.
        """
        if self._cache is None or self._cache_path is None:
            return
        compiled = bytes(self._cache.serialize())
        if compiled != self._cached:
            content = hashlib.sha256(compiled).digest() + compiled
            write_whole(self._cache_path, lambda file: file.write(content))
            self._cached = compiled

    def keep_kernels(self) -> None:
        """:meth:`save_kernels`, where a failure stops nothing."""
        try:
            self.save_kernels()
        except OutputError as error:
            # the next process compiles them again; this one has its images to make
            _log.warning("The kernels compiled for this GPU are not kept. %s", error)

    def _config(self, captured: bool) -> Any:
        trt = trt_module(self._library)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if captured and self._library == "tensorrt-rtx":
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            # graphs of its own inside of ours
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        if self._cache_path is not None:
            self._cache = config.create_runtime_cache()
            self._read_kernels(self._cache_path)
            config.set_runtime_cache(self._cache)
        return config

    def _read_kernels(self, path: Path) -> None:
        data = path.read_bytes() if path.is_file() else b""
        digest, kept = data[:_DIGEST], data[_DIGEST:]
        # the library is given nothing that was cut off or damaged
        if data and hashlib.sha256(kept).digest() == digest and self._cache.deserialize(kept):
            self._cached = kept
        elif data:
            _log.warning(
                "The runtime cache %s is damaged, or of another GPU or version: kernels are "
                "compiled anew.",
                path,
            )

    def _memory(self, size: int) -> Tensor:
        """At least ``size`` bytes; what there was before, if that will do."""
        if self._scratch is None or self._scratch.numel() < size:
            if self._scratch is not None:
                # a run on another stream than this one may still use it
                torch.get_device_module(self.device).synchronize(self.device)
            self._scratch = None
            with out_of_memory(self._spec):
                self._scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._scratch

    def _errors(self) -> AbstractContextManager[list[str]]:
        return typed_errors(trt_log(self._library), f"the graph {self._spec.graph} failed")

    def _failure(self, problem: str, errors: list[str]) -> HcmaError:
        return trt_failure(f"the graph {self._spec.graph} {problem}", errors, remedy=REBUILD)


@contextmanager
def out_of_memory(spec: IOSpec) -> Iterator[None]:
    """Raises DeviceMemoryError where torch lacks memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"out of memory in the graph {spec.graph}", remedy="Generate fewer images at once."
        ) from error


def shape_of(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    """Its shape for this batch size."""
    return tuple(batch if isinstance(size, str) else size for size in tensor.shape)
