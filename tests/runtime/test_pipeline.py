"""HCMAPipeline in torch eager: batches, seeds, settings, callbacks, output types and bad input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from torch import Tensor

import hcma_fast
from hcma_fast import HCMAPipeline, Layout
from hcma_fast.errors import (
    BackendError,
    DeviceMemoryError,
    DivergenceError,
    HcmaError,
    InputError,
    UsageError,
)
from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.runtime.generator import BatchGenerator
from hcma_fast.runtime.request import Request

DOG_PIZZA = Layout(["dog", "pizza"], [[0.05, 0.3, 0.45, 0.9], [0.5, 0.5, 0.95, 0.9]])
CAT = Layout(["cat"], [[0.2, 0.1, 0.8, 0.7]])
FEW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(random_components: Components) -> HCMAPipeline:
    return HCMAPipeline.from_components(random_components)


def test_public_names() -> None:
    assert set(hcma_fast.__all__) == {"HCMAPipeline", "Layout", "Request", "Result", "__version__"}
    assert hcma_fast.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nothing"):
        hcma_fast.nothing  # noqa: B018


def test_from_pretrained_runs_a_folder(random_checkpoint: Path, pipe: HCMAPipeline) -> None:
    loaded = HCMAPipeline.from_pretrained(random_checkpoint)
    assert (loaded.backend, loaded.engine_hash, loaded.image_size) == ("eager", None, 16)
    assert loaded.preset == "random" and loaded.components is not None
    assert loaded.weights_hash == pipe.weights_hash
    a, b = loaded("a dog", CAT, seed=3, **FEW), pipe("a dog", CAT, seed=3, **FEW)
    assert torch.equal(a.latents, b.latents)


def test_output_types_show_the_same_image(pipe: HCMAPipeline) -> None:
    def run(kind: Any) -> Any:
        return pipe("a dog", DOG_PIZZA, seed=1, num_inference_steps=4, output_type=kind).images

    image, array, tensor, latent = run("pil")[0], run("np"), run("pt"), run("latent")
    assert isinstance(image, Image.Image) and image.size == (16, 16) and image.mode == "RGB"
    assert array.shape == (1, 16, 16, 3) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1
    assert torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(array))
    assert np.abs(np.asarray(image) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert latent.shape == (1, 4, 8, 8)


def test_an_image_does_not_depend_on_its_batch(pipe: HCMAPipeline) -> None:
    prompts = ["a dog beside a pizza", "a cat", "nothing at all"]
    layouts = [DOG_PIZZA, CAT, Layout.empty()]
    together = pipe(prompts, layouts, seed=[7, 8, 9], negative_prompt=["", "bad", "x"], **FEW)
    for i, negative in enumerate(["", "bad", "x"]):
        alone = pipe(prompts[i], layouts[i], seed=7 + i, negative_prompt=negative, **FEW)
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-4, atol=1e-4)
        for one, all_ in zip(alone.losses, together.losses, strict=True):
            torch.testing.assert_close(one.loss_local[0], all_.loss_local[i], rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
def test_seeds_reproduce_and_count_up(pipe: HCMAPipeline) -> None:
    first = pipe("a dog", [CAT, CAT], seed=5, **FEW)
    assert first.seeds == [5, 6]
    assert torch.equal(first.latents, pipe("a dog", [CAT, CAT], seed=[5, 6], **FEW).latents)
    assert not torch.allclose(first.latents[0], first.latents[1])
    drawn = pipe("a dog", CAT, **FEW)
    assert torch.equal(drawn.latents, pipe("a dog", CAT, seed=drawn.seeds, **FEW).latents)


def test_latents_instead_of_seeds(pipe: HCMAPipeline) -> None:
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))[None]
    given = pipe("a dog", CAT, latents=noise, **FEW)
    assert given.seeds == []
    assert torch.equal(given.latents, pipe("a dog", CAT, seed=5, **FEW).latents)


def test_one_prompt_serves_many_layouts_and_the_reverse(pipe: HCMAPipeline) -> None:
    assert len(pipe("a dog", [CAT, DOG_PIZZA], seed=0, **FEW).latents) == 2
    assert len(pipe(["a dog", "a cat", "x"], CAT, seed=0, **FEW).latents) == 3
    assert len(pipe(["a dog", "a cat"], seed=0, **FEW).latents) == 2


def test_empty_layout_equals_none_and_is_finite(pipe: HCMAPipeline) -> None:
    out = pipe("a dog", Layout.empty(), seed=0, **FEW)
    assert out.latents.isfinite().all()
    assert torch.equal(out.latents, pipe("a dog", None, seed=0, **FEW).latents)
    assert out.losses[0].loss_local.abs().max() == 0 and out.losses[0].loss_global.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"eta0": 3.0},
        {"lambda_global": 5.0},
        {"lambda_local": 5.0},
        {"align_window": (0.0, 0.5)},
        {"grounding_beta": 0.5},
        {"guidance_scale": 2.0},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a cat"},
        {"num_inference_steps": 5},
    ],
)
def test_each_setting_matters(pipe: HCMAPipeline, change: dict[str, Any]) -> None:
    # lambdas well above 0 everywhere, so that each of them moves the latent visibly
    base = pipe("a dog", DOG_PIZZA, seed=0, **{**FEW, "eta0": 2.0})
    other = pipe("a dog", DOG_PIZZA, seed=0, **{**FEW, "eta0": 2.0, **change})
    assert (base.latents - other.latents).abs().max() > 1e-4


def test_prompt_phrase_and_box_matter(pipe: HCMAPipeline) -> None:
    base = pipe("a dog", CAT, seed=0, **FEW).latents
    moved = Layout(CAT.phrases, [[0.0, 0.0, 0.3, 0.3]])
    for prompt, layout in (("a cat", CAT), ("a dog", moved), ("a dog", Layout(["dog"], CAT.boxes))):
        assert (pipe(prompt, layout, seed=0, **FEW).latents - base).abs().max() > 1e-4


def test_eta_zero_is_the_limit_of_small_eta_and_records_no_losses(pipe: HCMAPipeline) -> None:
    off = pipe("a dog", CAT, seed=0, eta0=0.0, **FEW)
    small = pipe("a dog", CAT, seed=0, eta0=1e-12, **FEW)
    assert off.losses == [] and len(small.losses) == 4
    torch.testing.assert_close(off.latents, small.latents, rtol=1e-5, atol=1e-5)
    assert pipe("a dog", CAT, seed=0, align_window=(0.0, 0.0), **FEW).losses == []


def test_negative_prompt_needs_guidance_and_empty_is_the_default(pipe: HCMAPipeline) -> None:
    plain = pipe("a dog", CAT, seed=0, **FEW).latents
    assert torch.equal(plain, pipe("a dog", CAT, seed=0, negative_prompt="", **FEW).latents)
    one = pipe("a dog", CAT, seed=0, guidance_scale=1.0, **FEW).latents
    with_negative = pipe("a dog", CAT, seed=0, guidance_scale=1.0, negative_prompt="x", **FEW)
    assert torch.equal(one, with_negative.latents)


def test_callback_follows_the_steps_and_may_replace_latents(pipe: HCMAPipeline) -> None:
    seen: list[tuple[int, int]] = []

    def callback(p: HCMAPipeline, step: int, time: int, tensors: dict[str, Tensor]) -> Any:
        assert p is pipe and tensors["latents"].shape == (1, 4, 8, 8)
        seen.append((step, time))
        return {"latents": torch.zeros(1, 4, 8, 8)} if step == 3 else None

    out = pipe("a dog", CAT, seed=0, callback_on_step_end=callback, **FEW)
    assert seen == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert out.latents.abs().max() == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"prompt": ["a", "b"], "layout": [CAT] * 3}, InputError, "2 prompts.*3 layouts"),
        ({"prompt": []}, InputError, "no prompt"),
        ({"layout": []}, InputError, "no layout"),
        ({"layout": {"phrases": []}}, InputError, "Layout"),
        ({"prompt": ["a", 3]}, InputError, "string"),
        ({"prompt": "x" * 76}, InputError, "78 tokens.*77.*by 1 tokens"),
        ({"negative_prompt": "y" * 200}, InputError, "negative prompt has 202"),
        ({"layout": Layout(["z" * 90], [[0, 0, 1, 1]])}, InputError, "phrase has 92"),
        ({"negative_prompt": ["a", "b"]}, InputError, "2 negative prompts"),
        ({"seed": [1, 2]}, InputError, "there must be one seed"),
        ({"seed": -1}, InputError, "from 0 to"),
        ({"seed": 2**64}, InputError, "one seed"),
        ({"seed": True}, InputError, "one seed"),
        ({"seed": [0.5]}, InputError, "one seed"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, InputError, r"\(1, 4, 8, 8\)"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, InputError, "finite"),
        ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, InputError, "floating"),
        ({"output_type": "jpeg"}, UsageError, "pil"),
        ({"num_inference_steps": 1}, UsageError, "from 2 to 999"),
        ({"num_inference_steps": 1000}, UsageError, "from 2 to 999"),
        ({"num_inference_steps": 4.5}, UsageError, "whole number"),
        ({"guidance_scale": 0.5}, UsageError, "guidance_scale"),
        ({"guidance_scale": float("nan")}, UsageError, "guidance_scale"),
        ({"guidance_scale": float("inf")}, UsageError, "guidance_scale"),
        ({"eta0": -1.0}, UsageError, "eta0"),
        ({"lambda_local": -1.0}, UsageError, "lambda_local"),
        ({"grounding_beta": 1.5}, UsageError, "grounding_beta"),
        ({"align_window": (0.6, 0.4)}, UsageError, "window"),
        ({"align_window": (0.6,)}, UsageError, "window"),
        ({"eta0": 1e30, "lambda_global": 1e30}, UsageError, "diverged"),
    ],
)
def test_bad_input_is_a_typed_error_with_value_and_remedy(
    pipe: HCMAPipeline, kwargs: dict[str, Any], error: type[HcmaError], words: str
) -> None:
    arguments = {"prompt": "a dog", "layout": CAT, **FEW, **kwargs}
    with pytest.raises(error, match=words) as caught:
        pipe(**arguments)
    assert caught.value.remedy


def test_a_prompt_of_exactly_77_tokens_passes(pipe: HCMAPipeline) -> None:
    assert pipe("x" * 75, CAT, seed=0, **FEW).latents.isfinite().all()


def test_unknown_backend_and_device(random_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="eager, onnxruntime"):
        HCMAPipeline.from_pretrained(random_checkpoint, backend="tensorflow")
    with pytest.raises(UsageError, match="device"):
        HCMAPipeline.from_pretrained(random_checkpoint, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="CUDA"):
            HCMAPipeline.from_pretrained(random_checkpoint, device="cuda")


def test_out_of_memory_is_typed(pipe: HCMAPipeline) -> None:
    class Greedy(torch.nn.Module):
        def forward(self, z: Tensor) -> tuple[Tensor]:
            return (torch.empty(1 << 60),)

    engine = EagerEngine(Greedy(), pipe.engines["vae_decoder"].spec)
    with pytest.raises(DeviceMemoryError, match="vae_decoder"):
        engine({"z": torch.zeros(1)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_an_error(random_checkpoint: Path, value: float) -> None:
    pipe = HCMAPipeline.from_pretrained(random_checkpoint)
    good = pipe(["a dog", "a cat"], CAT, seed=0, **FEW).latents
    decoder = pipe.engines["vae_decoder"]

    class Faulty(EagerEngine):
        """Spoils one pixel of the second image."""

        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            image = decoder(inputs)["image"].clone()
            image[1:2, 0, 0, 0] = value
            return {"image": image}

    module = cast(EagerEngine, decoder).module
    pipe.engines = {**pipe.engines, "vae_decoder": Faulty(module, decoder.spec)}
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(DivergenceError, match=r"not finite.*image 1 of 2"):
            pipe(["a dog", "a cat"], CAT, seed=0, **{**FEW, "output_type": output_type})
    with pytest.raises(DivergenceError, match="image 1 of 2"):
        pipe.decode(good)
    assert pipe.decode(good[:1]).isfinite().all()
    # nothing is decoded
    assert torch.equal(pipe(["a dog", "a cat"], CAT, seed=0, **FEW).latents, good)
    # of many requests the one alone
    requests = [Request("a dog", CAT, seed=seed, num_inference_steps=2) for seed in range(2)]
    fine, faulty = BatchGenerator(pipe, max_batch=2).generate(requests)
    assert fine.error is None and fine.image is not None
    assert isinstance(faulty.error, DivergenceError) and faulty.image is None
    assert faulty.error.request == 1 and "not finite" in str(faulty.error)


def test_weights_of_the_vae_that_are_not_finite_are_an_error(
    random_checkpoint: Path, random_engine: Path
) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        parts = load_components(random_checkpoint)
        with torch.no_grad():
            parts.vae.decoder.conv_out.bias[0] = value
        pipe = HCMAPipeline.from_components(parts)
        with pytest.raises(DivergenceError, match="not finite"):
            pipe("a dog", CAT, seed=0, **{**FEW, "output_type": "pt"})
    # a clamp in the graph would hide them: some engines turn NaN into a number
    graph = ir.load(random_engine / "vae_decoder.onnx").graph
    assert "Clip" not in {node.op_type for node in graph}


def test_a_callback_that_returns_what_does_not_fit_is_told(pipe: HCMAPipeline) -> None:
    for returned, words in [
        *((7, "mapping"), ("latents", "mapping"), ([], "mapping"), (torch.zeros(1), "mapping")),
        *(({"latents": None}, r"\(1, 4, 8, 8\)"), ({"latents": torch.zeros(4)}, r"got \(4,\)")),
        ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "floating-point"),
    ]:
        with pytest.raises(UsageError, match=words):
            pipe("a dog", CAT, seed=0, callback_on_step_end=lambda *_, r=returned: r, **FEW)
    spoiled = {"latents": torch.full((1, 4, 8, 8), float("nan"))}
    with pytest.raises(DivergenceError):
        pipe("a dog", CAT, seed=0, callback_on_step_end=lambda *_: spoiled, **FEW)
    with pytest.raises(UsageError, match="function"):
        pipe("a dog", CAT, seed=0, callback_on_step_end=3, **FEW)  # type: ignore[arg-type]
    plain = pipe("a dog", CAT, seed=0, **FEW).latents
    for harmless in (None, {}, {"other": 1}):
        found = pipe("a dog", CAT, seed=0, callback_on_step_end=lambda *_, h=harmless: h, **FEW)
        assert torch.equal(found.latents, plain)
    wide = pipe(
        "a dog",
        CAT,
        seed=0,
        callback_on_step_end=lambda p, s, t, d: {"latents": d["latents"].double()},
        **FEW,
    )
    assert torch.equal(wide.latents, plain)


def test_numbers_may_be_numpys(pipe: HCMAPipeline) -> None:
    plain = pipe(
        "a dog",
        CAT,
        seed=3,
        num_inference_steps=4,
        guidance_scale=3.0,
        eta0=2.0,
        align_window=(0.25, 0.75),
        output_type="latent",
    ).images
    for kind in (np.int64, np.float32, np.array, lambda v: np.array([v]), torch.tensor):
        found = pipe(
            "a dog",
            CAT,
            seed=kind(3),
            num_inference_steps=kind(4),
            guidance_scale=kind(3),
            eta0=kind(2),
            align_window=np.array([0.25, 0.75]),
            output_type="latent",
        )
        assert torch.equal(found.images, plain) and found.seeds == [3]
    request = Request("a dog", CAT, seed=np.int64(3), num_inference_steps=np.int64(4))
    (result,) = BatchGenerator(pipe, max_batch=np.int64(2)).generate([request])  # type: ignore[arg-type]
    assert result.error is None
