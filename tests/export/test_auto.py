"""What ``auto`` takes: by the GPU, what is installed and what fits it, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hcma_fast.errors import BackendError
from hcma_fast.export import open as opening

MODULES = ("tensorrt", "tensorrt_rtx", "onnxruntime", "openvino")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Stands in for a machine: the modules that are installed, its GPU, if it has compilers."""

    def make(
        *modules: str, capability: tuple[int, int] | None = None, compilers: bool = True
    ) -> None:
        def check_compiler(device: str) -> None:
            assert device == "cuda"
            if not compilers:
                raise BackendError("the backend torch-compile found no C++ compiler", remedy="g++")

        def find_spec(name: str) -> Any:
            assert name in MODULES
            return name if name in modules else None

        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(opening, "find_spec", find_spec)
        monkeypatch.setattr(opening.aoti, "check_compiler", check_compiler)

    return make


def test_the_order_on_a_gpu_and_the_reason(machine: Machine) -> None:
    rtx, hopper = (8, 9), (9, 0)
    cases = [
        (MODULES, rtx, True, "tensorrt", "an NVIDIA GPU, and tensorrt is installed"),
        (MODULES[1:], rtx, True, "tensorrt-rtx", "tensorrt is not installed"),
        # RTX has no engines for data-centre cards
        (MODULES[1:], hopper, True, "torch-compile", "tensorrt-rtx has no engines for sm90"),
        (MODULES[2:], rtx, True, "torch-compile", "tensorrt-rtx is not installed"),
        (MODULES[2:], hopper, False, "eager", "found no C++ compiler"),
    ]
    for modules, capability, compilers, backend, reason in cases:
        machine(*modules, capability=capability, compilers=compilers)
        for device in (None, "cuda"):
            choice = opening.choose_backend(device)
            assert (choice.backend, choice.precision, choice.device) == (backend, "float16", "cuda")
            assert reason in choice.why
            assert choice.label == f"{backend} in float16"


def test_a_precision_or_device_that_is_asked_for_is_kept(machine: Machine) -> None:
    machine(*MODULES, capability=(9, 0))
    bfloat = opening.choose_backend("cuda:1", "bfloat16")
    assert (bfloat.backend, bfloat.precision, bfloat.device) == (
        "torch-compile",
        "bfloat16",
        "cuda:1",
    )
    assert "tensorrt has no bfloat16" in bfloat.why
    on_cpu = opening.choose_backend("cpu")
    assert (on_cpu.backend, on_cpu.precision, on_cpu.device) == ("onnxruntime", None, "cpu")


def test_without_a_gpu_as_ever(machine: Machine) -> None:
    machine(*MODULES)
    choice = opening.choose_backend()
    assert (choice.backend, choice.precision, choice.device) == ("onnxruntime", None, None)
    assert choice.why == "torch finds no NVIDIA GPU, and onnxruntime is installed"
    machine("openvino")
    assert opening.choose_backend().backend == "openvino"
    machine()
    with pytest.raises(BackendError, match="onnxruntime is not installed"):
        opening.choose_backend()
    machine(*MODULES)
    with pytest.raises(BackendError, match="finds no NVIDIA GPU"):
        opening.choose_backend("cuda")


def test_eager_is_nothing_to_build(machine: Machine) -> None:
    machine("onnxruntime", capability=(9, 0), compilers=False)
    assert opening.choose_backend().backend == "eager"
    assert opening.choose_backend(build=True).backend == "onnxruntime"
    machine(capability=(9, 0), compilers=False)
    with pytest.raises(BackendError, match="no C\\+\\+ compiler"):
        opening.choose_backend(build=True)
