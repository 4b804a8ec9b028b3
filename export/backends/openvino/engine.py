"""OpenVINO as an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.backends.openvino.model import (
    OpenVINOPrecision,
    compile_model,
    is_out_of_memory,
    openvino_version,
    read_model,
    runner,
    weight_bytes,
)
from hcma_fast.export.backends.split_batch import cut, join, rows_of
from hcma_fast.export.onnx.file import OnnxFile
from hcma_fast.specs import BATCH, GraphName, IOSpec

__all__ = ["OpenVINOEngine", "openvino_version"]

_OFTEN: tuple[GraphName, ...] = (
    "align",
    "unet_grounded",
    "unet_plain",
    "step_grounded",
    "step_plain",
    "vae_decoder",
)
"""Graphs worth a compilation for one shape; the others run once, on batches of any size"""
_MOST_WEIGHTS = 256 * 2**20
"""Bytes: each compilation packs the weights anew, 2 GB and 5 s for the UNet of SD 1.4, for which a
known shape gains 3 to 10%"""


class OpenVINOEngine:
    """Runs one ONNX file on the CPU; inputs are not copied, outputs are the caller's.

    OpenVINO fuses more in a graph whose shapes it knows, and threads that need not meet after each
    node lose less time (docs/decisions.md). So a small graph that runs often is compiled for
    batches of powers of two, when they are first needed; a batch is cut into such parts, as many of
    them side by side as there are threads. Large graphs are compiled once, for all batches.

    Args:
        source: the graph; it is read and its weights are mapped here, not at the first call.
        precision: of the products inside; inputs and outputs keep the spec's dtypes.
        threads: default: torch's number.

    Raises:
        BackendError: OpenVINO is missing, or would compute in another precision on this CPU.
        EngineError: the file cannot be read as a graph.
        DeviceMemoryError: the host has no memory left.
    """

    def __init__(
        self,
        source: Path | OnnxFile,
        spec: IOSpec,
        *,
        precision: OpenVINOPrecision = "float32",
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self._source = source = OnnxFile.open(source) if isinstance(source, Path) else source
        self._precision = precision
        self._threads = threads or torch.get_num_threads()
        model = read_model(source, precision=precision)
        # a request serves one call at a time, and a model is one shape at a time
        self._lock = threading.Lock()
        self._requests: dict[tuple[int, int], list[Any]] = {}
        self._whole: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
        if spec.graph in _OFTEN and spec.batch.min == 1 and weight_bytes(model) <= _MOST_WEIGHTS:
            self._model = model
            size, count = next(waves(spec.batch.opt, self._threads))
            self._requests[size, count] = self._compile(size, count)
        else:
            compiled = compile_model(model, source.path, precision=precision, threads=self._threads)
            self._whole = runner(compiled, spec, source)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.engine.Engine`.

        Raises:
            DeviceMemoryError: the host has no memory left.
        """
        try:
            return self._run(inputs)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, DeviceMemoryError):
                # a smaller batch takes other shapes, and needs the room of these
                self._requests.clear()
                raise DeviceMemoryError(
                    f"out of memory in the graph {self.spec.graph}",
                    remedy="Generate fewer images at once.",
                ) from error
            raise

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._whole is not None:
            return self._whole(inputs)
        plan = list(waves(rows_of(inputs, self.spec), self._threads))
        parts = iter(cut(inputs, self.spec, [size for size, count in plan for _ in range(count)]))
        done: list[Any] = []
        with self._lock:
            for size, count in plan:
                if (size, count) not in self._requests:
                    self._requests[size, count] = self._compile(size, count)
                requests = self._requests[size, count]
                run_together(requests, [self._feed(next(parts)) for _ in requests])
                done += requests
            names = self.spec.output_names
            return join(
                [{key: torch.from_numpy(of.get_tensor(key).data) for key in names} for of in done],
                self.spec,
            )

    def _compile(self, size: int, count: int) -> list[Any]:
        """Requests for ``count`` parts of ``size`` rows."""
        shapes = {
            tensor.name: [size if n == BATCH else int(n) for n in tensor.shape]
            for tensor in self.spec.inputs
        }
        compiled = compile_model(
            self._model,
            self._source.path,
            precision=self._precision,
            threads=self._threads,
            streams=count,
            shapes=shapes,
        )
        return [compiled.create_infer_request() for _ in range(count)]

    def _feed(self, part: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: part[name].contiguous().numpy() for name in self.spec.input_names}


def waves(rows: int, threads: int) -> Iterator[tuple[int, int]]:
    """Parts that a batch is cut into: size (a power of two) and how many run side by side.

    As many as there are threads, as large as they can be, until fewer rows than threads are left.
    Of those a power of two runs side by side, a row each, on several threads each: the halves of
    one guided image are two. No pair comes twice.
    """
    while rows:
        count = threads if rows >= threads else 1 << rows.bit_length() - 1
        size = 1 << (rows // count).bit_length() - 1
        yield size, count
        rows -= size * count


def run_together(requests: Sequence[Any], feeds: Sequence[Mapping[str, Any]]) -> None:
    """Run all, and wait for all, whatever happens to one of them."""
    started: list[Any] = []
    failed: list[Exception] = []
    for request, feed in zip(requests, feeds, strict=True):
        try:
            request.start_async(feed, share_inputs=True)
            started.append(request)
        except Exception as error:
            failed.append(error)
    for request in started:
        try:
            request.wait()
        except Exception as error:
            failed.append(error)
    if failed:
        raise failed[0]
