"""Engines by torch-compile for a GPU: built, validated, compared with eager, and captured.

Nobody has run these yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hcma_fast import HCMAPipeline
from hcma_fast.engine import Engine
from hcma_fast.export.backends.aoti.build import compile_aoti
from hcma_fast.export.backends.aoti.engine import CompiledEngine
from hcma_fast.export.build import build
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.open import verify
from hcma_fast.export.precision import Precision
from hcma_fast.export.target import Target
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.sampling.capture import CaptureMode
from hcma_fast.sampling.exported import graph_of
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import Savings
from hcma_fast.specs import STEP_NAMES, GraphName

from captures import LAYOUTS, conditioned, make_engines, noise, plan, relative

pytestmark = pytest.mark.gpu

MODES = pytest.mark.parametrize("mode", ["step", "trajectory"])
COMPILED: tuple[GraphName, ...] = ("grounding", "align", "unet_grounded", "unet_plain")
AGAIN = Savings(contexts_once=False, align_every=2, guidance_end=0.7)
GIVEN: dict[str, Any] = {"seed": 3, "num_inference_steps": 10, "output_type": "np"}


@pytest.fixture(scope="module")
def tiny() -> Components:
    return load_components("tiny")


@pytest.fixture(scope="module")
def folders(tiny: Components, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`tiny` for the GPU that is here, in each precision."""
    base = tmp_path_factory.mktemp("engines")
    precisions: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
    for precision in precisions:
        target = Target("torch-compile", precision, device="cuda")
        manifest = build(tiny, base / precision, target)
        assert manifest.device == "cuda"
        assert (
            "sm_{}{}".format(*torch.cuda.get_device_capability()) in manifest.key_parts["machine"]
        )
        # the weights of the source stay where they are
        assert {p.device.type for p in tiny.unet.parameters()} == {"cpu"}
    return {precision: base / precision for precision in precisions}


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-3), ("float16", 5e-2), ("bfloat16", 0.3)]
)
def test_a_folder_for_the_gpu_agrees_with_eager(
    tiny: Components, folders: dict[str, Path], precision: str, tolerance: float
) -> None:
    for _, record, error in verify(folders[precision], tiny):
        assert record.checked == "engine" and error <= record.tolerance
    # without a device: the manifest knows
    pipe = HCMAPipeline.from_pretrained(folders[precision])
    assert pipe.device == "cuda"
    expected = HCMAPipeline.from_components(tiny)(["a cat", "a dog"], LAYOUTS[:2], **GIVEN)
    found = pipe(["a cat", "a dog"], LAYOUTS[:2], **GIVEN)
    assert relative(found.latents.cpu(), expected.latents) < tolerance


@MODES
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_captured_images_are_those_of_the_plain_sampler(
    folders: dict[str, Path], precision: str, mode: CaptureMode
) -> None:
    pipe = HCMAPipeline.from_pretrained(folders[precision])
    batches = [(["a cat", "a dog"], LAYOUTS[:2]), (["a cup"], LAYOUTS[2:])]
    expected = [pipe(prompts, layouts, **GIVEN).images for prompts, layouts in batches]
    pipe.enable_cuda_graphs(mode)
    # a second shape while the first one's graphs stay, and the first one again
    for number in (0, 1, 0):
        prompts, layouts = batches[number]
        images = pipe(prompts, layouts, **GIVEN).images
        assert abs(images - expected[number]).max() < (1e-3 if precision == "float32" else 2e-2)


@MODES
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_cuda_graphs_hold_compiled_engines(
    tmp_path: Path, random_components: Components, mode: CaptureMode, fused: bool
) -> None:
    names = STEP_NAMES if fused else COMPILED
    engines: dict[GraphName, Engine] = make_engines(random_components, "cuda")
    for name in names:
        spec, path = random_components.specs()[name], tmp_path / f"{name}.pt2"
        compile_aoti(spec, graph_of(random_components, name), path, device="cuda")
        engines[name] = CompiledEngine(path, spec)
    sampler = ReplaySampler(engines, "cuda", mode=mode)
    schedules = [plan(beta=0.5)] if fused else [plan(beta=0.5), plan(savings=AGAIN)]
    for images in ([0, 1], [2], [1, 0]):
        given = conditioned(random_components, engines, images, device="cuda")
        for schedule in schedules:
            expected, _ = sample(engines, noise(images).cuda(), given, schedule)
            found, _ = sampler(noise(images).cuda(), given, schedule)
            assert relative(found, expected) < 1e-4


def test_a_batch_beyond_what_was_traced(tmp_path: Path, random_components: Components) -> None:
    """Its kernels were compiled for the whole range of the spec."""
    spec, module = random_components.specs()["vae_decoder"], random_components.graph("vae_decoder")
    compile_aoti(spec, module, tmp_path / "x.pt2", device="cuda")
    engine = CompiledEngine(tmp_path / "x.pt2", spec)
    z = noise(list(range(70)))
    with torch.no_grad():
        (expected,) = module(z)
    found = engine({"z": z.cuda()})["image"].cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_run_neither_waits_nor_keeps_memory(
    tmp_path: Path, random_components: Components
) -> None:
    spec = random_components.specs()["unet_grounded"]
    compile_aoti(spec, random_components.graph("unet_grounded"), tmp_path / "x.pt2", device="cuda")
    engine = CompiledEngine(tmp_path / "x.pt2", spec)
    drawn = random_inputs(spec, 2, torch.Generator().manual_seed(0))
    inputs = {name: value.cuda() for name, value in drawn.items()}
    engine(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before
