"""The torch-compile engine: torch's results, checked inputs, and no code of another machine."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from hcma_fast import HCMAPipeline
from hcma_fast.errors import BackendError, DeviceMemoryError, EngineError, InputError
from hcma_fast.export import cache
from hcma_fast.export.backends.aoti import build as aoti
from hcma_fast.export.backends.aoti.build import SIGNATURE_KEY, TARGET_KEY, compile_aoti, target
from hcma_fast.export.backends.aoti.engine import CompiledEngine
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.target import Target
from hcma_fast.export.validate import TOLERANCES, measure
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.opened import OpenedFile
from hcma_fast.specs import GRAPH_NAMES, BatchRange, GraphName, IOSpec, TensorSpec

SPEC = IOSpec(
    "vae_decoder",
    (TensorSpec("z", ("batch", 4, 6)), TensorSpec("timestep", ("batch",), "int64")),
    (TensorSpec("image", ("batch", 5)), TensorSpec("sum", ("batch",))),
    BatchRange(1, 1, 8),
)


class Small(nn.Module):
    """With a question on the batch, as diffusers asks it, that must not end up in the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 5)

    def forward(self, z: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        if z.shape[0] >= 4:
            z = z.contiguous()
        image = torch.softmax(self.linear(z.flatten(1)), -1) * (timestep[:, None] + 1).log()
        return image, z.sum((1, 2))


@pytest.fixture(scope="module")
def module() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once for all workers: that takes a C++ compiler a while."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small.pt2"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            torch.manual_seed(0)
            compile_aoti(SPEC, Small(), shared)
    return shared


@pytest.fixture(scope="module")
def engine(file: Path) -> CompiledEngine:
    return CompiledEngine(file, SPEC)


def draw(batch: int, seed: int = 0) -> dict[str, Tensor]:
    return random_inputs(SPEC, batch, torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_graph_equals_torch_at_every_batch(engine: CompiledEngine, module: Small) -> None:
    for batch in (1, 2, 3, 8):
        inputs = draw(batch)
        found = engine({**inputs, "extra": torch.zeros(batch)})
        expected = module(inputs["z"], inputs["timestep"])
        for name, reference in zip(SPEC.output_names, expected, strict=True):
            torch.testing.assert_close(found[name], reference, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_graph_of_tiny_equals_torch(tmp_path: Path, name: GraphName) -> None:
    components = load_components("tiny")
    spec, module = components.specs()[name], components.graphs()[name]
    compile_aoti(spec, module, tmp_path / "x.pt2")
    engine = CompiledEngine(tmp_path / "x.pt2", spec)
    vocabulary = len(components.tokenizer)
    assert measure(spec, module, engine, vocabulary=vocabulary) < TOLERANCES["float32"]
    inputs = random_inputs(spec, 70, torch.Generator().manual_seed(0), vocabulary)
    with torch.no_grad():
        expected = module(*(inputs[name] for name in spec.input_names))[0]
    torch.testing.assert_close(engine(inputs)[spec.output_names[0]], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_gradient_equals_float64_autograd(
    tmp_path: Path, random_components: Components
) -> None:
    spec = random_components.specs()["align"]
    compile_aoti(spec, random_components.graphs()["align"], tmp_path / "align.pt2")
    inputs = random_inputs(spec, 2, torch.Generator().manual_seed(0))
    # a step so long that z - z_aligned is the gradient, with next to no rounding of z in it
    inputs["eta"] = torch.full((2,), 1e6)
    found = CompiledEngine(tmp_path / "align.pt2", spec)(inputs)["z_aligned"]
    exact = copy.deepcopy(random_components.graphs()["align"]).double()
    expected = exact(*(inputs[name].double() for name in spec.input_names))[0]
    step = (inputs["z"].double() - expected).norm()
    assert float((found.double() - expected).norm() / step) < 1e-5


def test_the_next_call_leaves_outputs_alone(engine: CompiledEngine) -> None:
    inputs, other = draw(3), draw(3, seed=1)
    first = engine(inputs)
    kept = {name: value.clone() for name, value in first.items()}
    assert not torch.equal(engine(other)["image"], kept["image"])
    for name, value in kept.items():
        assert torch.equal(first[name], value)
        first[name].zero_()  # and may be written to
    assert torch.equal(engine(inputs)["image"], kept["image"])


def test_inputs_of_any_layout(engine: CompiledEngine) -> None:
    inputs = draw(3)
    z = inputs["z"].transpose(0, 2).contiguous().transpose(0, 2)
    assert not z.is_contiguous()
    assert torch.equal(engine({**inputs, "z": z})["image"], engine(inputs)["image"])


@pytest.mark.parametrize(
    "change",
    [
        {"z": torch.zeros(2, 4, 7)},
        {"z": torch.zeros(2, 4)},
        {"z": torch.zeros(2, 4, 6, dtype=torch.float64)},
        {"z": torch.zeros(3, 4, 6)},
        {"z": torch.zeros(0, 4, 6), "timestep": torch.zeros(0, dtype=torch.int64)},
        {"z": torch.zeros(9, 4, 6), "timestep": torch.zeros(9, dtype=torch.int64)},
    ],
    ids=["size", "rank", "dtype", "two batches", "no image", "above the range"],
)
def test_inputs_that_native_code_would_misread_are_refused(
    engine: CompiledEngine, change: dict[str, Tensor]
) -> None:
    with pytest.raises(InputError, match="graph vae_decoder takes"):
        engine({**draw(2), **change})


def test_an_opened_file_is_loaded_whatever_lies_under_its_name(
    tmp_path: Path, file: Path, engine: CompiledEngine
) -> None:
    inputs = draw(2)
    expected = engine(inputs)
    path = Path(shutil.copy(file, tmp_path / "x.pt2"))
    opened = [OpenedFile(path) for _ in range(2)]
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "other").replace(path)
    engines = [CompiledEngine(opened[0], SPEC)]
    path.unlink()
    engines.append(CompiledEngine(opened[1], SPEC))
    for loaded in engines:
        found = loaded(inputs)
        assert all(torch.equal(found[name], expected[name]) for name in SPEC.output_names)


def test_a_file_that_is_no_engine(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "x.pt2"
    with pytest.raises(EngineError, match=r"x\.pt2"):
        CompiledEngine(path, SPEC)
    path.write_bytes(b"not an engine")
    with pytest.raises(EngineError, match=r"x\.pt2"):
        CompiledEngine(path, SPEC)
    # right metadata, and nothing to run
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(*_metadata("cpu"))
    with pytest.raises(EngineError, match=r"x\.pt2"):
        CompiledEngine(path, SPEC)


def _metadata(device: str) -> tuple[str, str]:
    """Name and content of the archive's entry for a graph of ``SPEC``."""
    tensors = [
        {t.name: [[-1 if n == "batch" else n for n in t.shape], t.dtype] for t in way}
        for way in (SPEC.inputs, SPEC.outputs)
    ]
    entries = {
        TARGET_KEY: target(device),
        SIGNATURE_KEY: json.dumps(tensors),
        "AOTI_DEVICE_KEY": device,
    }
    return "x/data/aotinductor/model/wrapper_metadata.json", json.dumps(entries)


def test_an_edited_signature_is_refused_before_code_is_loaded(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code takes its tensors by position: a name that is changed would go unnoticed."""
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: pytest.fail("no"))
    first = SPEC.inputs[0]
    for inputs, word in (
        ((replace(first, name="zz"), *SPEC.inputs[1:]), "zz"),
        ((replace(first, shape=("batch", *first.shape[1:-1], 1)), *SPEC.inputs[1:]), first.name),
        ((replace(first, dtype="float16"), *SPEC.inputs[1:]), "float16"),
        (SPEC.inputs[1:], first.name),
        (SPEC.inputs[::-1], "order"),
    ):
        with pytest.raises(EngineError, match=word):
            CompiledEngine(file, replace(SPEC, inputs=inputs))
    with pytest.raises(EngineError, match=first.name):
        CompiledEngine(file, replace(SPEC, outputs=(*SPEC.outputs, first)))


def test_code_of_another_machine_is_not_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: pytest.fail("no"))
    with pytest.raises(EngineError, match="another machine"):
        CompiledEngine(file, SPEC)


class Model:
    """Stands in for code of a GPU: notes how it was opened, and what holds while it runs."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.running, self.most = 0, 0
        self.convolutions: set[str] = set()

    def open(self, path: str, **options: Any) -> Model:
        self.opened = options
        return self

    def __call__(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.convolutions.add(torch.backends.cudnn.conv.fp32_precision)
        time.sleep(0.02)
        self.running -= 1
        return args[0], args[0]


@pytest.fixture
def on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Model]:
    """A file for the GPU sm_89, which is as if it were here, and what is loaded from it."""
    model, path = Model(), tmp_path / "gpu.pt2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", model.open)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(*_metadata("cuda"))
    return path, model


@pytest.fixture
def on_gpu_unchecked(
    on_gpu: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Model]:
    """The same, and what the CPU's tensors are is not looked at."""
    monkeypatch.setattr(aoti, "_check_inputs", lambda spec, args, device: None)
    return on_gpu


def test_code_of_a_gpu_runs_on_its_architecture_alone(
    on_gpu: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = on_gpu
    engine = CompiledEngine(path, SPEC)
    # without which no CUDA graph can hold it
    assert model.opened == {"run_single_threaded": True}
    with pytest.raises(InputError, match=r"on cuda:0.*\n?.*on cpu"):
        engine(draw(2))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: pytest.fail("no"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    with pytest.raises(EngineError, match="sm_120") as caught:
        CompiledEngine(path, SPEC)
    assert "sm_89" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no GPU"):
        CompiledEngine(path, SPEC)


def test_threads_take_turns_on_a_gpu_and_products_are_exact(
    on_gpu_unchecked: tuple[Path, Model],
) -> None:
    path, model = on_gpu_unchecked
    before = torch.backends.cudnn.conv.fp32_precision
    # two engines: the setting is the process's
    engines = [CompiledEngine(path, SPEC) for _ in range(2)]
    threads = [threading.Thread(target=engines[k % 2], args=(draw(1),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.most == 1
    assert model.convolutions == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before != "ieee"


def test_a_gpu_without_memory_is_an_error_of_its_own(
    on_gpu: tuple[Path, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AOTInductor names the call that failed and not why; torch's allocator counts."""
    path, _ = on_gpu
    misses = [3]
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": misses[0]})
    engine = CompiledEngine(path, SPEC)

    def fail(inputs: object) -> dict[str, Tensor]:
        raise RuntimeError("aoti_torch_empty_strided(...) API call failed at model.cpp, line 7")

    engine._run = fail
    for found in (4, 9):
        misses[0] = found
        with pytest.raises(DeviceMemoryError, match="out of memory in the graph"):
            engine({})
        with pytest.raises(RuntimeError, match="API call failed"):
            engine({})

    def refuse(path: str, **options: Any) -> None:
        misses[0] += short
        raise RuntimeError("create_func_( &container_handle_, num_models) API call failed at x.cpp")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", refuse)
    for short, error in ((1, DeviceMemoryError), (0, EngineError)):
        with pytest.raises(error, match="weights of the graph" if short else "cannot load"):
            CompiledEngine(path, SPEC)


def test_a_gpu_gets_its_inputs_at_addresses_that_its_code_reads(
    on_gpu_unchecked: tuple[Path, Model],
) -> None:
    path, _ = on_gpu_unchecked
    given = draw(1)
    name = SPEC.input_names[0]
    table = torch.zeros(given[name].numel() + 1, dtype=given[name].dtype)
    odd = table[1:].view(given[name].shape).copy_(given[name])
    assert odd.data_ptr() % 16
    found = CompiledEngine(path, SPEC)({**given, name: odd})
    # the stand-in hands back what it was given
    value = found[SPEC.output_names[0]]
    assert value.data_ptr() % 16 == 0 and torch.equal(value, given[name])


def test_out_of_memory_is_typed_and_the_rest_is_not_hidden(file: Path) -> None:
    engine = CompiledEngine(file, SPEC)
    for message, kind, expected in (
        ("can't allocate memory: you tried", DeviceMemoryError, "out of memory in the graph"),
        ("other", RuntimeError, "other"),
    ):

        def fail(inputs: object, message: str = message) -> dict[str, Tensor]:
            raise RuntimeError(message)

        engine._run = fail
        with pytest.raises(kind, match=expected):
            engine(draw(2))


@pytest.mark.parametrize(
    ("backend", "device", "built_for"),
    [
        ("torch-compile", "cuda", "cuda"),
        ("torch-compile", None, "cpu"),
        ("onnxruntime", "cuda", "cpu"),
    ],
)
def test_from_pretrained_asks_for_code_of_its_device(
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    device: str | None,
    built_for: str,
) -> None:
    class Asked(Exception):
        """Instead of a build."""

    def ask(checkpoint: object, target: Target, **_: object) -> None:
        raise Asked(target.device)

    monkeypatch.setattr(cache, "engine_folder", ask)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Asked, match=built_for):
        HCMAPipeline.from_pretrained(random_checkpoint, backend=backend, device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if device == "cuda":
        with pytest.raises(BackendError, match="no CUDA device"):
            HCMAPipeline.from_pretrained(random_checkpoint, backend=backend, device=device)
