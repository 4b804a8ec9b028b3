"""The state that a program has set in torch changes no image; a forked child is refused at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.errors import UsageError
from hcma_fast.export.build import build
from hcma_fast.export.manifest import load_manifest
from hcma_fast.export.target import Target
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.runtime.generator import BatchGenerator, Request

CAT = Layout(["cat"], [[0.1, 0.1, 0.7, 0.9]])


@contextmanager
def put_back(change: Callable[..., object], value: object, before: object) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: put_back(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: put_back(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta device": lambda: put_back(torch.set_default_device, "meta", None),
    "autocast": lambda: torch.autocast("cpu"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "narrow products": lambda: put_back(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: put_back(torch.use_deterministic_algorithms, True, False),
}


def state() -> tuple[Any, ...]:
    """What a program may have set, to see that it is left alone."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def call(pipe: HCMAPipeline, **more: Any) -> list[torch.Tensor]:
    out = pipe("a cat", CAT, seed=3, num_inference_steps=3, output_type="pt", **more)
    return [out.images, out.latents, out.losses[-1].loss_local]


def batch(pipe: HCMAPipeline) -> list[torch.Tensor]:
    requests = [Request("a cat", CAT, seed, num_inference_steps=3) for seed in (3, 4)]
    return [result.latent for result in BatchGenerator(pipe, max_batch=1).generate(requests)]


def test_calls_give_the_same_bits_and_put_back_the_state(random_checkpoint: Path) -> None:
    pipe = HCMAPipeline.from_pretrained(random_checkpoint)
    expected, of_batch = call(pipe), batch(pipe)
    noise = torch.randn(1, 4, 8, 8)
    from_noise = call(pipe, latents=noise)
    for name, enter in STATES.items():
        with enter():
            before = state()
            found, several = call(pipe), batch(pipe)
            loaded = HCMAPipeline.from_pretrained(random_checkpoint)
            assert state() == before, name
            after_loading = call(loaded)
        for tensors in (found, after_loading, call(loaded)):
            assert all(map(torch.equal, tensors, expected)), name
            assert not any(tensor.is_inference() for tensor in tensors), name
        assert all(map(torch.equal, several, of_batch)), name
    with torch.inference_mode():
        assert all(map(torch.equal, call(pipe, latents=noise.clone()), from_noise))
        stays = call(pipe, latents=noise, callback_on_step_end=lambda *a: {"latents": noise * 1})
    assert stays[1].equal(noise)


def test_a_state_is_left_where_it_was_after_an_error(random_checkpoint: Path) -> None:
    pipe = HCMAPipeline.from_pretrained(random_checkpoint)
    with STATES["float64"](), torch.inference_mode():
        before = state()
        with pytest.raises(UsageError):
            pipe("a cat", num_inference_steps=1)
        assert state() == before


@pytest.mark.slow
def test_engines_are_built_alike(
    random_engine: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    names = ("float64", "meta device", "autocast", "inference mode", "deterministic")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(STATES[name]())
        components = load_components(random_checkpoint)
        found = build(components, tmp_path / "engine", Target(backend="onnxruntime"))
        compiled = HCMAPipeline.from_pretrained(random_engine)
        there = call(compiled)
    plain = load_manifest(random_engine)
    assert {n: g.sha256 for n, g in found.graphs.items()} == {
        n: g.sha256 for n, g in plain.graphs.items()
    }
    # ONNX Runtime computes alike too, whatever was set when it was opened
    assert all(map(torch.equal, there, call(HCMAPipeline.from_pretrained(random_engine))))


def in_child(work: Callable[[], object]) -> str:
    """What ``work`` ends with in a forked child; a child that hangs is killed."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            said = "no error"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(into, said.encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.timeout(60)
def test_a_forked_child_is_refused_at_once(random_checkpoint: Path) -> None:
    pipe = HCMAPipeline.from_pretrained(random_checkpoint)
    generator = BatchGenerator(pipe)
    for work in (
        lambda: pipe("a cat", CAT, num_inference_steps=2),
        lambda: list(generator.generate([Request("a cat")])),
        lambda: HCMAPipeline.from_pretrained(random_checkpoint),
        lambda: pipe.decode(torch.zeros(1, 4, 8, 8)),
        lambda: load_components(random_checkpoint),
    ):
        said = in_child(work)
        assert said.startswith("UsageError: this process was forked"), said
        assert "Load the pipeline in the worker" in said
    # the parent goes on
    assert pipe("a cat", CAT, num_inference_steps=2).latents.isfinite().all()
