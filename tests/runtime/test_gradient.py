"""The gradient's backends: each agrees with float64 autograd, and works in the pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.bench.speed.harness.contestants import SD14, components_of
from hcma_fast.errors import BackendError, UsageError
from hcma_fast.export.onnx.trace import example_inputs, random_inputs, trace_gradient
from hcma_fast.export.precision import at_precision
from hcma_fast.kernels.cosine_loss import cosine_loss_op
from hcma_fast.kernels.region_pool import region_pool
from hcma_fast.losses import local_mean
from hcma_fast.models.aligner import AlignStep
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.runtime.gradient import gradient_engine

LAYOUT = Layout(["dog", "pizza"], [(0.05, 0.3, 0.45, 0.9), (0.5, 0.5, 0.95, 0.9)])


@pytest.fixture(scope="module")
def tiny() -> Components:
    """Trained weights: random ones give gradients too small to tell."""
    return load_components("tiny")


def _inputs(components: Components, batch: int, boxes: int = 3) -> dict[str, Tensor]:
    spec = components.specs()["align"]
    inputs = random_inputs(spec, batch, torch.Generator().manual_seed(batch), boxes=boxes)
    return {**inputs, "eta": torch.ones(batch)}


def _gradient64(components: Components, inputs: dict[str, Tensor]) -> Tensor:
    """By autograd through the losses of losses.py, in float64."""
    aligner = copy.deepcopy(components.aligner).double()
    given = {name: value.double() for name, value in inputs.items()}
    leaf = given["z"].requires_grad_()
    mask, (first, second) = given["region_mask"], given["lambdas"].unbind(1)
    texts = (given["caption_embedding"], given["label_embeddings"])
    whole, parts = aligner.losses(leaf, *texts, given["regions"], mask)
    objective = first * whole + second * local_mean(parts, mask)
    (gradient,) = torch.autograd.grad(objective.sum(), leaf)
    return gradient


def _error(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    "name",
    [
        "eager",
        pytest.param("compile", marks=pytest.mark.slow),
        pytest.param("onnx", marks=pytest.mark.slow),  # builds all engines of tiny
    ],
)
def test_agrees_with_float64_autograd(tiny: Components, name: str) -> None:
    engine = gradient_engine(name, tiny, tiny.specs()["align"], "cpu")
    for batch, boxes in ((1, 3), (2, 0), (5, 30)):
        inputs = _inputs(tiny, batch, boxes)
        # the rate is 1, so the gradient is what was taken off; larger than z, to keep its digits
        z = inputs["z"].clone()
        rate = 1e3
        found = engine({**inputs, "eta": torch.full((batch,), rate)})
        gradient = (z.double() - found["z_aligned"].double()) / rate
        assert _error(gradient, _gradient64(tiny, inputs)) <= 1e-5
        torch.testing.assert_close(inputs["z"], z, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "compile"])
def test_agrees_with_float64_autograd_at_full_size(name: str) -> None:
    """Random weights have small gradients, which a latent's rounding hides at a rate of 1."""
    drawn = components_of(SD14, drawn=("aligner",))
    engine = gradient_engine(name, drawn, drawn.specs()["align"], "cpu")
    for batch, boxes in ((1, 3), (2, 30)):
        inputs, rate = _inputs(drawn, batch, boxes), 1e6
        found = engine({**inputs, "eta": torch.full((batch,), rate)})
        gradient = (inputs["z"].double() - found["z_aligned"].double()) / rate
        assert _error(gradient, _gradient64(drawn, inputs)) <= 1e-5


@pytest.mark.slow
def test_float16_agrees_with_float64_autograd_at_full_size() -> None:
    drawn = components_of(SD14, drawn=("aligner",))
    step = at_precision("align", AlignStep(drawn.aligner), "float16")
    for batch, boxes in ((1, 3), (2, 30)):
        inputs, rate = _inputs(drawn, batch, boxes), 1e6
        given = {**inputs, "eta": torch.full((batch,), rate)}
        with torch.no_grad():
            aligned = step(*(given[name] for name in drawn.specs()["align"].input_names))[0]
        gradient = (inputs["z"].double() - aligned.double()) / rate
        assert _error(gradient, _gradient64(drawn, inputs)) <= 5e-3


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_ops_of_the_fused_kernels_take_their_places(
    tiny: Components, dtype: str, compiled: bool
) -> None:
    """On a CPU the ops run their references; on a GPU the Triton kernels."""
    if compiled and dtype != "float32":
        pytest.skip("inductor's code for halves on a CPU is not what a GPU runs")
    step = at_precision("align", AlignStep(tiny.aligner), dtype)
    step.losses, step.pool = cosine_loss_op, region_pool
    spec = tiny.specs()["align"]
    run = trace_gradient(step, example_inputs(spec))
    targets = " ".join(str(node.target) for node in run.graph.nodes)
    for op in ("cosine_loss", "region_pool", "region_pool_backward"):
        assert f"hcma_fast.{op}.default" in targets
    function = torch.compile(run, dynamic=True) if compiled else run
    inputs = _inputs(tiny, 2)
    inputs["eta"] *= 1e3
    with torch.no_grad():
        aligned = function(*(inputs[key] for key in spec.input_names))[0]
    gradient = (inputs["z"].double() - aligned.double()) / 1e3
    # twice what torch's autocast has in bfloat16, where rounding the weights alone costs 0.7e-2
    limit = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    assert _error(gradient, _gradient64(tiny, inputs)) <= limit


@pytest.mark.slow
def test_the_pipeline_takes_it_in_place_of_the_backend(tiny: Components) -> None:
    given = {"num_inference_steps": 3, "seed": 0, "output_type": "latent", "eta0": 30.0}
    plain = HCMAPipeline.from_pretrained("tiny")("a dog", LAYOUT, **given)
    pipe = HCMAPipeline.from_pretrained("tiny", grad_backend="compile")
    assert pipe.grad_backend == "compile"
    found = pipe("a dog", LAYOUT, **given)
    torch.testing.assert_close(found.latents, plain.latents, rtol=1e-4, atol=1e-4)


def test_what_cannot_run_is_refused_first(random_engine: object) -> None:
    with pytest.raises(BackendError, match="fused kernels"):
        HCMAPipeline.from_pretrained("tiny", grad_backend="triton")
    with pytest.raises(UsageError, match="unknown backend of the gradient"):
        HCMAPipeline.from_pretrained("tiny", grad_backend="jax")
    with pytest.raises(UsageError, match="its gradient"):
        HCMAPipeline.from_pretrained(str(random_engine), grad_backend="eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_is_not_refused_where_the_backend_runs_on_a_gpu_by_default() -> None:
    pytest.importorskip("triton")
    # what is missing here is the GPU, and not an option
    with pytest.raises(BackendError, match="no CUDA device"):
        HCMAPipeline.from_pretrained("tiny", backend="tensorrt-rtx", grad_backend="triton")
