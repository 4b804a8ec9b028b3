"""A TensorRT context: its scratch memory and kernels, and what a CUDA graph asks of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hcma_fast.errors import BackendError, DeviceMemoryError, EngineError, UsageError
from hcma_fast.export.backends.trt.build import TRTReport, trt_module
from hcma_fast.export.manifest import VerifiedFolder
from hcma_fast.export.open import open_engine
from hcma_fast.opened import OpenedFile
from hcma_fast.sampling.capture import check_capturable

from trt_graph import expected, make_inputs


def test_scratch_memory_is_torchs_and_moves_for_a_larger_batch_only(stand_in: Any) -> None:
    engine = stand_in.start()
    strategies = trt_module("tensorrt-rtx").ExecutionContextAllocationStrategy
    assert stand_in.strategy == strategies.USER_MANAGED
    assert stand_in.scratch == (0, 0), "none before the batch is known"
    engine(make_inputs(2))
    first = stand_in.scratch
    assert first[1] == 2000
    for batch in (1, 2, 2):
        engine(make_inputs(batch))
        assert stand_in.scratch == first
    engine(make_inputs(4))
    assert stand_in.scratch[1] == 4000
    # a fork has memory of its own, at one address, and shapes that are set once
    twin = stand_in.on_cpu(engine.fork())
    held = stand_in.scratch
    twin(make_inputs(2))
    assert stand_in.scratch[1] == 2000 and stand_in.scratch[0] != held[0]
    held, shapes_set = stand_in.scratch, stand_in.shapes_set
    for _ in range(3):
        twin(make_inputs(2))
    assert (stand_in.scratch, stand_in.shapes_set) == (held, shapes_set)


def test_an_engine_that_needs_scratch_for_some_batch_is_given_some_for_every(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "update_device_memory_size_for_shapes", lambda: 0)
    stand_in.needs = 10
    stand_in.start()(make_inputs(2))
    assert stand_in.scratch[1] == 256
    stand_in.needs, stand_in.scratch, stand_in.batch = 0, (0, 0), 0
    stand_in.start()(make_inputs(2))
    assert stand_in.scratch == (0, 0)


def test_scratch_that_is_refused_or_lacking_is_typed_and_tried_again(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stand_in.start()
    stand_in.refuses_scratch = True
    with pytest.raises(EngineError, match="refuses its scratch memory: too little device memory"):
        engine(make_inputs(2))
    stand_in.refuses_scratch = False
    assert len(engine(make_inputs(2))) == 2
    inputs, outputs = make_inputs(4), engine.allocate(4)

    def lacking(*sizes: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lacking)
        with pytest.raises(DeviceMemoryError, match="out of memory in the graph align"):
            engine.bind(inputs, outputs)
    engine.bind(inputs, outputs)
    engine.enqueue()
    torch.testing.assert_close(outputs, expected(inputs))


def test_no_capture_meets_an_allocation(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = stand_in.on_cpu(stand_in.start().fork())
    twin(make_inputs(2))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    twin(make_inputs(2))
    with pytest.raises(UsageError, match=r"align: 2 to 3.*Run it once"):
        twin(make_inputs(3))


def test_a_fork_is_made_for_a_cuda_graph(stand_in: Any) -> None:
    trt = trt_module("tensorrt-rtx")
    engine = stand_in.start()
    names = ("dynamic_shapes_kernel_specialization_strategy", "cuda_graph_strategy")
    assert not any(hasattr(stand_in, name) for name in names), "a plain engine starts at once"
    engine.fork()
    assert [getattr(stand_in, name) for name in names] == [
        trt.DynamicShapesKernelSpecializationStrategy.EAGER,
        trt.CudaGraphStrategy.DISABLED,
    ]
    # what the stand-in takes exists in the library
    config = vars(trt.IRuntimeConfig)
    assert {*names, "set_execution_context_allocation_strategy"} <= set(config)
    used = {"update_device_memory_size_for_shapes", "set_device_memory", "is_stream_capturable"}
    assert used <= set(vars(trt.IExecutionContext))
    assert "device_memory_size_v2" in vars(trt.ICudaEngine)


def test_an_engine_says_whether_a_cuda_graph_can_hold_it(stand_in: Any) -> None:
    with pytest.raises(BackendError, match=r"REQUIRE_USER_ALLOCATION.*Build it again"):
        stand_in.start(user_allocation=False).check_capturable()
    engine = stand_in.start()
    stand_in.capturable = False
    engine(make_inputs(2))
    engine.check_capturable()  # it is a fork that is captured, on a stream of its own
    twin = stand_in.on_cpu(engine.fork())
    twin.check_capturable()  # nothing ran yet
    twin(make_inputs(2))
    with pytest.raises(BackendError, match="says that no CUDA graph can hold this engine"):
        twin.check_capturable()
    stand_in.capturable = True
    twin.check_capturable()


def test_the_record_of_a_build_decides_what_may_be_captured(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    report = TRTReport(
        library="tensorrt-rtx",
        version="1",
        architectures=("sm89",),
        size_bytes=1,
        stripped=False,
        seconds=1,
        network_layers=1,
        network_dtypes={},
        network_product_dtypes={},
    )
    engine_file = tmp_path / "a.engine"
    engine_file.write_bytes(b"engine")
    assert not report.user_allocation, "a record from before there was this entry"
    for found in (report, report.model_copy(update={"user_allocation": True})):
        record = SimpleNamespace(file="a.engine", sha256="0" * 64, spec=stand_in.spec, engine=found)
        target = SimpleNamespace(strip_weights=False)
        manifest = SimpleNamespace(graphs={"align": record}, backend="tensorrt-rtx", target=target)
        files = {"a.engine": OpenedFile(engine_file)}
        folder = VerifiedFolder(tmp_path, manifest, files)  # type: ignore[arg-type]
        engine = open_engine(folder, "align", "cuda")
        if found.user_allocation:
            check_capturable("step", "cuda", "tensorrt-rtx", None, {"align": engine})
        else:
            with pytest.raises(BackendError, match="without what a CUDA graph needs"):
                check_capturable("step", "cuda", "tensorrt-rtx", None, {"align": engine})


def _with_hash(kernels: bytes) -> bytes:
    return hashlib.sha256(kernels).digest() + kernels


@pytest.mark.parametrize("kept", ["whole", "stale", "damaged", "cut off", "empty"])
def test_the_runtime_cache_is_read_if_it_is_good_and_written_after_the_first_call(
    stand_in: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    path = tmp_path / "kernels"
    whole = _with_hash(b"old:")
    damaged = {"damaged": whole[:-1] + b"?", "cut off": whole[:20], "empty": b""}
    path.write_bytes(damaged.get(kept, whole))
    stand_in.stale_cache = kept == "stale"
    engine = stand_in.start(path)
    assert stand_in.kernels == (b"old:" if kept == "whole" else b"")
    assert (str(path) in caplog.text) == (kept not in ("whole", "empty"))
    engine(make_inputs(1))
    compiled = b"old:k" if kept == "whole" else b"k"
    assert path.read_bytes() == _with_hash(compiled)
    engine(make_inputs(1))
    assert path.read_bytes() == _with_hash(compiled)
    engine.save_runtime_cache()
    assert path.read_bytes() == _with_hash(compiled + b"k")


def test_kernels_that_cannot_be_kept_do_not_stop_an_image(
    stand_in: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = stand_in.start(tmp_path / "missing" / "kernels")
    engine(make_inputs(1))
    assert "are not kept" in caplog.text
