"""TensorRT as an engine, for both of its libraries; torch's CUDA tensors are bound in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcma_fast.errors import (
    BackendError,
    EngineError,
    InputError,
    UsageError,
)
from hcma_fast.export.backends.trt.build import (
    TRTLibrary,
    dtype_name,
    parser_errors,
    trt_failure,
    trt_log,
    trt_module,
    typed_errors,
)
from hcma_fast.export.backends.trt.context import REBUILD, TRTContext, out_of_memory, shape_of
from hcma_fast.export.signature import check_signature
from hcma_fast.opened import OpenedFile
from hcma_fast.specs import BATCH, IOSpec, TensorSpec


class TRTEngine:
    """Runs one engine file on the GPU that is current when it is made.

    A call gives fresh outputs, which belong to the caller. For CUDA graphs use :meth:`bind` with
    buffers of your own, then :meth:`enqueue`, which neither allocates nor waits, on a
    :meth:`fork`. Not for two threads or streams at once: they would share its scratch memory. Keep
    it until its work is done.

    Args:
        source: the engine file; read here.
        weights_onnx: the ONNX file that a stripped engine was built from; read here.
        runtime_cache: where TensorRT-RTX keeps the kernels that it compiles for this GPU; read if
            it is there, and written after the first call, and by :meth:`save_runtime_cache`.
        user_allocation: whether a TensorRT-RTX engine was built so that it allocates nothing
            (``TRTReport.user_allocation``), without which no CUDA graph can hold it.

    Raises:
        BackendError: the library, the driver, or torch's CUDA is missing.
        EngineError: the file is no engine for this version and GPU, or not of this ``spec``; its
            weights are missing, or not those of ``weights_onnx``.
        DeviceMemoryError: the GPU has no memory left.
        UsageError: a runtime cache for ``tensorrt``, which has none.
    """

    def __init__(
        self,
        source: Path | OpenedFile,
        spec: IOSpec,
        library: TRTLibrary,
        *,
        weights_onnx: Path | None = None,
        runtime_cache: Path | None = None,
        user_allocation: bool = False,
    ) -> None:
        if runtime_cache is not None and library != "tensorrt-rtx":
            raise UsageError(
                "tensorrt has no runtime cache: its kernels are in the engine",
                remedy="Leave it out, or use tensorrt-rtx.",
            )
        trt = trt_module(library)
        self.spec = spec
        self._library = library
        self._engine = load_engine(source, library)
        if not torch.cuda.is_available():
            raise BackendError(
                "this torch has no CUDA, which TensorRT's inputs and outputs need",
                remedy="Install a CUDA build of torch: see pytorch.org/get-started.",
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._check_signature(trt)
        self._check_range()
        if weights_onnx is not None:
            refit_trt(self._engine, weights_onnx, library)
        elif self._engine.get_engine_stat(trt.EngineStat.STRIPPED_WEIGHTS_SIZE) > 0:
            raise EngineError(
                f"the engine of {spec.graph} was built without its weights",
                value=str(source if isinstance(source, Path) else source.path),
                remedy="Give the ONNX file that it was built from, or build it with weights.",
            )
        self._capturable = library == "tensorrt" or user_allocation
        self._runtime_cache = runtime_cache
        self._bound: tuple[Tensor, ...] = ()
        self._warm = False
        self.context = self._start()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.engine.Engine`. Runs on torch's current stream.

        Inputs that are not contiguous are copied. Buffers bound before are no longer bound after.

        Raises:
            InputError: an input is missing, or of another shape, dtype or device than the spec's.
            DeviceMemoryError: the GPU has no memory left.
            EngineError: TensorRT could not run.
            UsageError: another batch size than a captured :meth:`fork` had before.
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
            self.context.keep_kernels()
        return outputs

    def fork(self, captured: bool = True) -> TRTEngine:
        """The same engine with a context of its own, for one batch size if ``captured``.

        A graph that captured a context needs it as it was then: its shapes and scratch memory.

        Raises:
            EngineError, DeviceMemoryError: there can be no second context.
        """
        twin = copy.copy(self)
        twin._bound, twin._warm = (), False
        twin.context = twin._start(captured=captured)
        return twin

    def check_capturable(self) -> None:
        """See :class:`hcma_fast.engine.Stateful`.

        It goes by the build and, for a :meth:`fork` that ran, by the library's word for torch's
        current stream.

        Raises:
            BackendError: the engine was not built for a CUDA graph, or its context says no.
        """
        if not self._capturable:
            raise BackendError(
                "this engine was built without what a CUDA graph needs (REQUIRE_USER_ALLOCATION)",
                value=f"{self.spec.graph}, {self._library}",
                remedy="Build it again, hcma-fast build --force, or leave CUDA graphs off.",
            )
        stream = torch.cuda.current_stream(self.device).cuda_stream
        asks = self.context.captured and self.context.batch > 0
        if asks and not self.context.is_capturable(stream):
            raise BackendError(
                f"{self._library} says that no CUDA graph can hold this engine",
                value=f"{self.spec.graph}, batch size {self.context.batch}",
                remedy="Leave CUDA graphs off, and report it with the output of hcma-fast doctor.",
            )

    def allocate(self, batch: int) -> dict[str, Tensor]:
        """Uninitialised outputs for this batch size, on the engine's device.

        Raises:
            DeviceMemoryError: the GPU has no memory left.
        """
        with out_of_memory(self.spec):
            return {
                tensor.name: torch.empty(
                    shape_of(tensor, batch), dtype=getattr(torch, tensor.dtype), device=self.device
                )
                for tensor in self.spec.outputs
            }

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Let the next :meth:`enqueue` read and write these tensors, by address.

        They stay the caller's, who may refill the inputs between calls; the engine holds on to them
        until the next ``bind`` or call. A CUDA graph that captured ``enqueue`` has their addresses
        for good: keep them as long as the graph.

        Raises:
            InputError: one is missing, not contiguous, or of another shape, dtype or device.
            EngineError: TensorRT refuses them.
            DeviceMemoryError: the GPU has no memory left for this batch size.
            UsageError: another batch size than before, while a CUDA graph is captured.
        """
        spec = self.spec
        batch = check_tensors(spec, spec.inputs, inputs, self.device)
        if check_tensors(spec, spec.outputs, outputs, self.device) != batch:
            raise _wrong(spec, "the outputs have another batch size than the inputs", batch)
        tensors = {t.name: inputs[t.name] for t in spec.inputs}
        tensors |= {t.name: outputs[t.name] for t in spec.outputs}
        self.context.set_batch(batch)
        self.context.set_addresses(tensors)
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
        self.context.run(stream.cuda_stream)

    def save_runtime_cache(self) -> None:
        """Write what TensorRT-RTX compiled since it was loaded; call it after a warm-up.

        Raises:
            OutputError: the file cannot be written.
        """
        self.context.save_kernels()

    def _start(self, captured: bool = False) -> TRTContext:
        given = (self._engine, self.spec, self._library, self.device, self._runtime_cache)
        return TRTContext(*given, captured=captured)

    def _found(self, name: str) -> tuple[tuple[int, ...], str]:
        shape = tuple(self._engine.get_tensor_shape(name))
        return shape, dtype_name(self._engine.get_tensor_dtype(name))

    def _check_signature(self, trt: Any) -> None:
        """Whether the engine's inputs and outputs are the spec's, in any order."""
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        inputs, outputs = (
            {n: self._found(n) for n in names if self._engine.get_tensor_mode(n) == mode}
            for mode in modes
        )
        check_signature(self.spec, inputs, outputs, ordered=False)

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
                    remedy=REBUILD,
                )


def load_engine(source: Path | OpenedFile, library: TRTLibrary) -> Any:
    """The file as an ``ICudaEngine``.

    Raises:
        BackendError: the library is missing, or there is no NVIDIA GPU with a recent driver.
        EngineError: the file cannot be read, or is no engine for this version and GPU.
        DeviceMemoryError: the GPU has no memory left.
    """
    trt, log = trt_module(library), trt_log(library)
    what = f"{library} cannot load this engine"
    path = source if isinstance(source, Path) else source.path
    try:
        opened = OpenedFile(source) if isinstance(source, Path) else source
    except OSError as error:
        raise EngineError(what, value=str(path), remedy=REBUILD) from error
    with typed_errors(log, what) as errors:
        engine = trt.Runtime(log).deserialize_cuda_engine(opened.memory)
        if engine is None:
            raise trt_failure(what, errors, value=str(path), remedy=REBUILD)
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
        wanted = (shape_of(tensor, batch or 0), f"torch.{tensor.dtype}", device, True)
        actual = (tuple(found.shape), str(found.dtype), found.device, found.is_contiguous())
        if actual != wanted:
            raise _wrong(spec, f"{tensor.name} is not {_words(*wanted)}", _words(*actual))
    if batch is None:
        raise _wrong(spec, "no tensor has a batch size", ", ".join(given))
    return batch


def _words(shape: tuple[int, ...], dtype: str, device: torch.device, contiguous: bool) -> str:
    return f"{dtype} {shape} on {device}{'' if contiguous else ', not contiguous'}"


def _wrong(spec: IOSpec, problem: str, value: object) -> InputError:
    return InputError(
        f"wrong tensors for the graph {spec.graph}: {problem}",
        value=value,
        remedy="hcma_fast.specs has the shapes; a wider batch range needs another build.",
    )
