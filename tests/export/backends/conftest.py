"""A stand-in for TensorRT: an engine whose memory is the CPU's."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hcma_fast.export.backends.trt import engine as runtime
from hcma_fast.export.backends.trt.build import trt_log, trt_module
from hcma_fast.export.backends.trt.engine import TRTEngine

from trt_graph import SPEC, expected


@dataclass
class StandIn:
    """Engine, its context and runtime cache in one; computes on the CPU, through addresses only."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    high: int = 4
    stripped: int = -1
    stale_cache: bool = False
    fails: Exception | bool = False
    addresses: dict[str, int] = field(default_factory=dict)
    #: bytes of scratch memory per image, and those that it was given
    needs: int = 1000
    scratch: tuple[int, int] = (0, 0)
    refuses_scratch: bool = False
    capturable: bool = True
    shapes_set: int = 0
    batch: int = 0
    stream: int = 0
    kernels: bytes = b""

    spec = SPEC

    @staticmethod
    def start(
        runtime_cache: Path | None = None,
        user_allocation: bool = True,
    ) -> TRTEngine:
        engine = TRTEngine(
            Path("a.engine"),
            SPEC,
            "tensorrt-rtx",
            runtime_cache=runtime_cache,
            user_allocation=user_allocation,
        )
        return StandIn.on_cpu(engine)

    @staticmethod
    def on_cpu(engine: TRTEngine) -> TRTEngine:
        engine.device = engine.context.device = torch.device("cpu")
        return engine

    num_io_tensors = property(lambda self: len(self.shapes))

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = trt_module("tensorrt-rtx").TensorIOMode
        return modes.OUTPUT if name in SPEC.output_names else modes.INPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.batch or -1 if size == -1 else size for size in self.shapes[name])

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(trt_module("tensorrt-rtx").DataType, self.dtypes[name])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        sizes = (1, 2, self.high)
        return [tuple(n if size == -1 else size for size in self.shapes[name]) for n in sizes]

    def get_engine_stat(self, stat: Any) -> int:
        return self.stripped

    def create_runtime_config(self, *_: object) -> StandIn:
        return self

    create_runtime_cache = set_runtime_cache = create_execution_context = create_runtime_config

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    @property
    def device_memory_size_v2(self) -> int:
        return self.needs * self.high

    def update_device_memory_size_for_shapes(self) -> int:
        return self.needs * self.batch

    def set_device_memory(self, address: int, size: int) -> None:
        if self.refuses_scratch:
            severity = trt_module("tensorrt-rtx").ILogger.Severity
            trt_log("tensorrt-rtx").log(severity.ERROR, "too little device memory")
        self.scratch = (address, size)

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == 5
        return self.capturable

    def deserialize(self, kernels: bytes) -> bool:
        if not self.stale_cache:
            self.kernels = kernels
        return not self.stale_cache

    def serialize(self) -> bytes:
        return self.kernels

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes_set += 1
        if -1 in self.shapes[name]:
            self.batch = shape[0]
        return len(shape) == len(self.shapes[name])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def _view(self, name: str) -> Tensor:
        shape = self.get_tensor_shape(name)
        kind = ctypes.c_int64 if self.dtypes[name] == "INT64" else ctypes.c_float
        memory = (kind * int(np.prod(shape))).from_address(self.addresses[name])
        return torch.from_numpy(np.ctypeslib.as_array(memory)).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        if isinstance(self.fails, Exception):
            raise self.fails
        self.stream = stream
        self.kernels += b"k"
        address, size = self.scratch
        assert size >= self.needs * self.batch
        ctypes.memset(address, 0xFF, self.needs * self.batch)
        for name, tensor in expected({n: self._view(n) for n in SPEC.input_names}).items():
            self._view(name).copy_(tensor)
        return not self.fails


TENSORS = (*SPEC.inputs, *SPEC.outputs)
SHAPES = {t.name: tuple(-1 if size == "batch" else int(size) for size in t.shape) for t in TENSORS}
DTYPES = {name: "INT64" if name == "timestep" else "FLOAT" for name in SHAPES}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """What ``stand_in.start`` runs on: as if there were a GPU, whose memory is the CPU's."""
    pytest.importorskip("tensorrt_rtx")
    engine = StandIn(dict(SHAPES), dict(DTYPES))
    monkeypatch.setattr(runtime, "load_engine", lambda path, library: engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    return engine
