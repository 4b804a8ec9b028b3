"""ONNX Runtime as an engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.backends.onnxruntime.session import (
    CUDA,
    TENSORRT,
    cuda_runner,
    onnxruntime_version,
    open_session,
    runner,
    tensorrt_options,
)
from hcma_fast.export.backends.split_batch import cut, join, rows_of
from hcma_fast.export.kernel_cache import drop_damaged, note_hashes
from hcma_fast.export.onnx.file import OnnxFile
from hcma_fast.specs import IOSpec

_Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

_MAX_IDLE = 0.15
"""Share of the threads' time that a split may leave unused where the batch does not divide"""


class OrtEngine:
    """Runs one ONNX file; tensors go in and out without a copy.

    On a CPU a batch of at least as many images as there are threads is split: each thread runs
    its share by itself, which saves the threads' meeting after each of hundreds of small nodes
    (docs/decisions.md). The results are the same to the last bit, as no node mixes images.
    A smaller batch is run as a whole, by all threads together.

    Args:
        source: the graph. On a CPU every session is made from the content that it has now.
        device: "cpu", "cuda" or "cuda:N"; tensors must lie there.
        threads: of the CPU; default torch's number.
        tensorrt: folder in which ONNX Runtime's TensorRT provider keeps its engine and its timings;
            None to leave that provider alone. Only for "cuda".

    Raises:
        BackendError: ONNX Runtime is missing, or has no CUDA or no TensorRT, or the latter does not
            take the whole graph.
        EngineError: the file cannot be read; what is wrong with the graph is known on a CPU at the
            first call.
    """

    def __init__(
        self,
        source: Path | OnnxFile,
        spec: IOSpec,
        *,
        device: str = "cpu",
        threads: int | None = None,
        tensorrt: Path | None = None,
    ) -> None:
        self.spec = spec
        self._threads = threads or torch.get_num_threads()
        self._cuda: _Run | None = None
        # sessions are opened when they are needed: each prepares weights of its own
        self._sessions: dict[int, _Run] = {}
        self._opening = threading.Lock()
        onnxruntime_version()
        place = torch.device(device)
        if device == "cuda" and torch.cuda.is_available():
            place = torch.device("cuda", torch.cuda.current_device())
        if tensorrt is not None:
            session = _tensorrt_session(source, spec, place, tensorrt)
            self._cuda = cuda_runner(session, spec, place)
        elif place.type == "cuda":
            # ONNX Runtime's own default rounds the inputs of float32 products to TF32
            card = {"device_id": str(place.index or 0), "use_tf32": "0"}
            session = open_session(source, CUDA, provider_options=card)
            self._cuda = cuda_runner(session, spec, place)
        elif isinstance(source, Path):
            source = OnnxFile.open(source)
        #: of every session on the CPU, whenever it is made
        self._source = source

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.engine.Engine`.

        Raises:
            DeviceMemoryError: the host has no memory left.
        """
        try:
            return self._run(inputs)
        except Exception as error:  # onnxruntime's kinds share no base class but this one
            if "alloc" in str(error).lower():
                raise DeviceMemoryError(
                    f"out of memory in the graph {self.spec.graph}",
                    remedy="Generate fewer images at once.",
                ) from error
            raise

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._cuda is not None:
            return self._cuda(inputs)
        batch = rows_of(inputs, self.spec)
        if not splits(batch, self._threads, self.spec):
            return self._session(self._threads)(inputs)
        share, more = divmod(batch, self._threads)
        sizes = [share + (k < more) for k in range(self._threads)]
        run, parts = self._session(1), cut(inputs, self.spec, sizes)
        pending = [_workers().submit(run, part) for part in parts[1:]]
        return join([run(parts[0]), *(future.result() for future in pending)], self.spec)

    def _session(self, threads: int) -> _Run:
        with self._opening:
            if threads not in self._sessions:
                session = open_session(self._source, threads=threads)
                self._sessions[threads] = runner(session, self.spec)
            return self._sessions[threads]


def _tensorrt_session(
    source: Path | OnnxFile, spec: IOSpec, device: torch.device, folder: Path
) -> Any:
    # ONNX Runtime reads what it finds there; what was cut off or changed it must not find
    drop_damaged(folder)
    options = tensorrt_options(spec, folder, device)
    session = open_session(source, TENSORRT, provider_options=options)
    note_hashes(folder)
    return session


def splits(batch: int, threads: int, spec: IOSpec) -> bool:
    """Whether a share of the batch for each thread keeps them all busy, and is not too small."""
    if threads < 2 or batch // threads < spec.batch.min:
        return False
    longest = -(-batch // threads)
    return 1 - batch / (threads * longest) <= _MAX_IDLE


@cache
def _workers() -> ThreadPoolExecutor:
    """Threads of all engines: they only ever wait for ONNX Runtime, never for each other."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="hcma-fast-ort")
