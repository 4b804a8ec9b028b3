"""Batches in parts: nothing is lost, mixed up or shared; engines that do it equal the whole."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.backends.openvino import engine as openvino
from hcma_fast.export.backends.openvino import model as openvino_model
from hcma_fast.export.backends.openvino.engine import OpenVINOEngine, run_together, waves
from hcma_fast.export.backends.split_batch import cut, join, rows_of
from hcma_fast.export.onnx.export import export_onnx
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.validate import TOLERANCES, cases_for, measure
from hcma_fast.export.weights_file import WeightsFile
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.sampling.exported import graph_of
from hcma_fast.specs import GRAPH_NAMES, BatchRange, GraphName, IOSpec, TensorSpec

SPEC = IOSpec(
    "vae_decoder",
    (TensorSpec("index", (1,), "int64"), TensorSpec("z", ("batch", 2))),
    (TensorSpec("image", ("batch", 2)), TensorSpec("next", (1,), "int64")),
)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_parts_are_the_batch_in_order_and_share_what_has_none(sizes: list[int]) -> None:
    z = torch.arange(2.0 * sum(sizes)).view(-1, 2)
    index = torch.tensor([7])
    inputs = {"z": z, "index": index, "more": torch.zeros(3)}
    assert rows_of(inputs, SPEC) == sum(sizes)
    parts = cut(inputs, SPEC, sizes)
    assert [len(part["z"]) for part in parts] == sizes
    assert all(part["index"] is index and set(part) == {"z", "index"} for part in parts)
    found = join([{"image": part["z"], "next": part["index"]} for part in parts], SPEC)
    assert torch.equal(found["image"], z)
    assert torch.equal(found["next"], index)
    for value in found.values():
        value.zero_()
    assert float(z.sum()) > 0, "outputs are the caller's own"
    assert int(index) == 7


@given(st.integers(1, 600), st.integers(1, 64))
def test_waves_are_the_batch_in_few_shapes(rows: int, threads: int) -> None:
    found = list(waves(rows, threads))
    assert sum(size * count for size, count in found) == rows
    assert all(size & (size - 1) == 0 and 1 <= count <= threads for size, count in found)
    assert len(set(found)) == len(found)
    # all threads have a row, but for the fewer rows than threads that are left
    assert sum(size * count for size, count in found if count < threads) < threads
    assert len(found) <= (rows // threads).bit_length() + threads.bit_length()


@pytest.mark.parametrize(
    ("rows", "threads", "expected"),
    [
        (1, 1, [(1, 1)]),
        (1, 2, [(1, 1)]),
        (2, 2, [(1, 2)]),
        (7, 2, [(2, 2), (1, 2), (1, 1)]),
        (16, 2, [(8, 2)]),
        (7, 1, [(4, 1), (2, 1), (1, 1)]),
        (2, 16, [(1, 2)]),
        (6, 16, [(1, 4), (1, 2)]),
    ],
)
def test_waves_by_hand(rows: int, threads: int, expected: list[tuple[int, int]]) -> None:
    assert list(waves(rows, threads)) == expected


class Request:
    """OpenVINO's, as far as ``run_together`` uses it."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.waited = fault, 0

    def start_async(self, feed: Mapping[str, Any], share_inputs: bool) -> None:
        if self.fault == "start":
            raise RuntimeError("does not start")

    def wait(self) -> None:
        self.waited += 1
        if self.fault == "wait":
            raise RuntimeError("fails on the way")


@pytest.mark.parametrize("fault", ["start", "wait"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failed_part_is_raised_when_no_other_runs_on(fault: str, place: int) -> None:
    requests = [Request(fault if k == place else "") for k in range(3)]
    with pytest.raises(RuntimeError, match="start" if fault == "start" else "on the way"):
        run_together(requests, [{}] * 3)
    for k, request in enumerate(requests):
        assert request.waited == (0 if k == place and fault == "start" else 1)


@pytest.mark.parametrize("name", [n for n in GRAPH_NAMES if n in openvino._OFTEN])
def test_openvino_in_parts_equals_itself_as_a_whole(
    random_engine: Path,
    random_components: Components,
    monkeypatch: pytest.MonkeyPatch,
    name: GraphName,
) -> None:
    path, spec = random_engine / f"{name}.onnx", random_components.specs()[name]
    parted = OpenVINOEngine(path, spec, threads=2)
    monkeypatch.setattr(openvino, "_MOST_WEIGHTS", 0)
    whole = OpenVINOEngine(path, spec, threads=2)
    inputs = random_inputs(spec, 7, torch.Generator().manual_seed(0))
    expected, found = whole(inputs), parted(inputs)
    for key, value in expected.items():
        assert found[key].shape == value.shape
        torch.testing.assert_close(found[key], value, rtol=2e-4, atol=2e-5)
    # an image does not depend on the batch that it comes in
    for rows in (1, 2, 4):
        few = parted({key: value[:rows] for key, value in inputs.items()})
        for key, value in found.items():
            torch.testing.assert_close(few[key], value[:rows], rtol=1e-6, atol=1e-6)


def test_openvino_compiles_a_shape_once_and_only_what_it_needs(
    random_engine: Path, random_components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[list[int], int]] = []
    actual = openvino_model.compile_model

    def compile_model(model: Any, path: Path, **options: Any) -> Any:
        made.append((options["shapes"]["z"], options["streams"]))
        return actual(model, path, **options)

    monkeypatch.setattr(openvino, "compile_model", compile_model)
    spec = random_components.specs()["vae_decoder"]
    path = random_engine / "vae_decoder.onnx"
    engine = OpenVINOEngine(path, spec, threads=2)
    latent = [int(n) for n in spec.inputs[0].shape[1:]]
    assert made == [([1, *latent], 1)], "that of the batch it is tuned for"
    for rows in (1, 2, 3, 2, 3, 1, 5):
        engine({"z": torch.zeros(rows, *latent)})
    assert made == [([1, *latent], 1), ([1, *latent], 2), ([2, *latent], 2)]


def test_memory_that_is_lacking_is_given_back(
    random_engine: Path, random_components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller batch has other shapes, for which the host must have room."""
    spec = random_components.specs()["vae_decoder"]
    engine = OpenVINOEngine(random_engine / "vae_decoder.onnx", spec, threads=2)
    z = random_inputs(spec, 4, torch.Generator().manual_seed(0))
    expected = engine({"z": z["z"][:1]})["image"]

    def fail(*given: object, **options: object) -> None:
        raise DeviceMemoryError("out of memory", remedy="none")

    with monkeypatch.context() as patch:
        patch.setattr(openvino, "compile_model", fail)
        with pytest.raises(DeviceMemoryError, match="fewer images"):
            engine(z)
    assert engine._requests == {}
    assert torch.equal(engine({"z": z["z"][:1]})["image"], expected)


class Step(nn.Module):
    """Of ``SPEC``: an input and an output without a batch, as step graphs have."""

    def forward(self, index: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * z + index, index + 1


def test_a_graph_with_tensors_of_no_batch_runs_in_parts(tmp_path: Path) -> None:
    with WeightsFile(tmp_path) as weights:
        export_onnx(SPEC, Step(), tmp_path / "step.onnx", weights, vocabulary=10)
    engine = OpenVINOEngine(tmp_path / "step.onnx", SPEC, threads=2)
    assert engine._whole is None
    for rows in (1, 2, 7):
        z = torch.randn(rows, 2)
        found = engine({"index": torch.tensor([3]), "z": z})
        torch.testing.assert_close(found["image"], 2 * z + 3)
        assert found["next"].tolist() == [4]
    assert len(engine._requests) > 1


@pytest.mark.slow
def test_a_step_graph_runs_in_parts(tmp_path: Path, random_components: Components) -> None:
    """Some of its inputs and outputs have no batch."""
    name, parts = "step_grounded", random_components
    spec, module = parts.specs()["step_grounded"], graph_of(parts, "step_grounded")
    path, vocabulary = tmp_path / f"{name}.onnx", len(parts.tokenizer)
    with WeightsFile(tmp_path) as weights:
        export_onnx(spec, module, path, weights, vocabulary=vocabulary)
    engine = OpenVINOEngine(path, spec, threads=2)
    assert engine._whole is None
    error = measure(spec, module, engine, vocabulary=vocabulary, cases=cases_for(spec, module))
    assert error < TOLERANCES["float32"]
    assert len(engine._requests) > 2


def test_threads_take_turns_at_an_engine(
    random_engine: Path, random_components: Components
) -> None:
    spec = random_components.specs()["unet_plain"]
    engine = OpenVINOEngine(random_engine / "unet_plain.onnx", spec, threads=2)
    given = [random_inputs(spec, 1 + k % 3, torch.Generator().manual_seed(k)) for k in range(6)]
    expected = [engine(inputs)["noise_pred"] for inputs in given]
    found: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        for _ in range(3):
            found[k] = engine(given[k])["noise_pred"]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], expected[k]) for k in range(len(given)))


@pytest.mark.parametrize("batch", [BatchRange(2, 2, 2), BatchRange(2, 4, 8)], ids=str)
def test_openvino_leaves_graphs_of_some_batches_whole(
    random_engine: Path, random_components: Components, batch: BatchRange
) -> None:
    """Their ONNX may hold the size, or not hold for one image."""
    spec = random_components.specs()["vae_decoder"]
    limited = IOSpec(spec.graph, spec.inputs, spec.outputs, batch)
    engine = OpenVINOEngine(random_engine / "vae_decoder.onnx", limited, threads=2)
    z = random_inputs(spec, 2, torch.Generator().manual_seed(0))
    assert engine._whole is not None
    assert engine(z)["image"].shape[0] == 2
