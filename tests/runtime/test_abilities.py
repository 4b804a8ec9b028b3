"""Models without an aligner, without GLIGEN's layers, or without both."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import InputError, UsageError
from hcma_fast.export.build import build
from hcma_fast.export.target import Target
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.models.checkpoint.json_files import tell_once
from hcma_fast.models.checkpoint.state_hash import encoder_hashes
from hcma_fast.runtime.generator import BatchGenerator, Request
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.sampling.savings import Savings

LAYOUT = Layout(["dog", "pizza"], [[0.05, 0.3, 0.45, 0.9], [0.5, 0.5, 0.95, 0.9]])
EMPTY = Layout.empty()


def without_gligen(folder: Path) -> None:
    """The same UNet without its gated layers, as a plain SD 1.x has it."""
    config = json.loads((folder / "unet/config.json").read_text())
    config["attention_type"] = "default"
    (folder / "unet/config.json").write_text(json.dumps(config))
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    names = UNet2DConditionModel.from_config(config).state_dict()
    save_file({name: value for name, value in load_file(file).items() if name in names}, file)


@pytest.fixture(scope="module")
def models(
    random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, HCMAPipeline]:
    """Pipelines of one model: whole, and without one or both of its parts."""
    root, made = tmp_path_factory.mktemp("abilities"), {}
    for name in ("whole", "no-aligner", "plain", "neither"):
        folder = Path(shutil.copytree(random_checkpoint, root / name))
        if name in ("no-aligner", "neither"):
            shutil.rmtree(folder / "aligner")
        if name in ("plain", "neither"):
            without_gligen(folder)
        made[name] = HCMAPipeline.from_components(load_components(folder))
    return made


def draw(pipe: HCMAPipeline, layout: Layout = LAYOUT, **values: Any) -> torch.Tensor:
    out = pipe(
        "a dog",
        layout,
        seed=3,
        num_inference_steps=4,
        output_type="pt",
        guidance_scale=2.0,
        **values,
    )
    assert isinstance(out.images, torch.Tensor)
    return out.images


def test_which_graphs_there_are(models: dict[str, HCMAPipeline]) -> None:
    common = {"text_encoder", "grounding", "unet_plain", "vae_decoder"}
    for name, more, eta0, beta in (
        ("whole", {"align", "unet_grounded"}, 0.5, 1.0),
        ("no-aligner", {"unet_grounded"}, 0.0, 1.0),
        ("plain", {"align"}, 0.5, 0.0),
        ("neither", set(), 0.0, 0.0),
    ):
        assert set(models[name].engines) == common | more
        assert (models[name].settings.eta0, models[name].settings.grounding_beta) == (eta0, beta)


def test_each_is_the_whole_model_with_that_part_off_to_the_bit(
    models: dict[str, HCMAPipeline],
) -> None:
    whole = models["whole"]
    for name, layout, off in (
        ("no-aligner", LAYOUT, {"eta0": 0.0}),
        ("plain", LAYOUT, {"grounding_beta": 0.0}),
        ("plain", EMPTY, {"grounding_beta": 0.0}),
        ("neither", EMPTY, {"grounding_beta": 0.0, "eta0": 0.0}),
    ):
        ours = draw(models[name], layout)
        assert torch.equal(ours, draw(whole, layout, **off)), name
        assert not torch.equal(ours, draw(whole, layout)), name
    # the alignment alone reads the boxes
    assert not torch.equal(draw(models["plain"]), draw(models["plain"], EMPTY))


def test_batches_of_requests(models: dict[str, HCMAPipeline]) -> None:
    for name, layout in (("no-aligner", LAYOUT), ("plain", LAYOUT), ("neither", EMPTY)):
        requests = [Request("a dog", layout, seed=seed, num_inference_steps=3) for seed in (1, 2)]
        found = BatchGenerator(models[name], max_batch=1).generate(requests)
        for request, result in zip(requests, found, strict=True):
            steps = {"num_inference_steps": 3, "output_type": "pil"}
            alone = models[name]("a dog", layout, seed=request.seed, **steps).images[0]
            assert result.image is not None and result.image.tobytes() == alone.tobytes()


def test_what_they_cannot_do_is_refused(models: dict[str, HCMAPipeline]) -> None:
    bare, plain, neither = models["no-aligner"], models["plain"], models["neither"]
    idle, closed = Savings(skip_idle_alignment=False), Savings(skip_closed_gate=False)
    for pipe, layout, values, kind, words in (
        (bare, LAYOUT, {"eta0": 0.5}, UsageError, "no aligner.*eta0=0.5"),
        (bare, LAYOUT, {"savings": idle}, UsageError, "no aligner"),
        (plain, LAYOUT, {"grounding_beta": 0.3}, UsageError, "no GLIGEN's layers.*=0.3"),
        (plain, LAYOUT, {"savings": closed}, UsageError, "no GLIGEN's layers"),
        (plain, LAYOUT, {"eta0": 0.0}, InputError, "boxes would have no effect"),
        (neither, LAYOUT, {}, InputError, "boxes would have no effect"),
        (neither, EMPTY, {"eta0": 1.0}, UsageError, "no aligner"),
    ):
        with pytest.raises(kind, match=words):
            draw(pipe, layout, **values)
    for pipe, request, kind in (
        (neither, Request("a dog", LAYOUT), InputError),
        (bare, Request("a dog", settings=AlignmentSettings(eta0=1.0)), UsageError),
    ):
        with pytest.raises(kind):
            list(BatchGenerator(pipe).generate([request]))


@pytest.mark.slow
def test_engines_of_such_models(models: dict[str, HCMAPipeline], tmp_path: Path) -> None:
    for name, layout in (("no-aligner", LAYOUT), ("neither", EMPTY)):
        parts = models[name].components
        assert parts is not None
        manifest = build(parts, tmp_path / name, Target(backend="onnxruntime"))
        assert set(manifest.graphs) == set(models[name].engines)
        pipe = HCMAPipeline.from_engines(tmp_path / name)
        assert (draw(pipe, layout) - draw(models[name], layout)).abs().max() < 1e-4
        with pytest.raises(UsageError, match="fuse=step"):
            build(parts, tmp_path / "fused", Target(backend="onnxruntime", fuse="step"))
        assert not (tmp_path / "fused").exists()


def test_an_aligner_of_another_base_is_told(
    random_checkpoint: Path,
    random_components: Components,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = random_components
    hashes = encoder_hashes(parts.vae, parts.text_encoder, parts.tokenizer)
    folder = Path(shutil.copytree(random_checkpoint / "aligner", tmp_path / "aligner"))
    config = json.loads((folder / "config.json").read_text())
    for ours, words in (
        (hashes, None),
        (("0", hashes[1]), "another VAE than"),
        (("0", "0"), "another VAE and text encoder"),
    ):
        base = dict(zip(("vae_sha256", "text_sha256"), ours, strict=True))
        (folder / "config.json").write_text(json.dumps(config | base))
        tell_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hcma_fast"):
            found = load_components(random_checkpoint, aligner=folder)
        assert found.own_aligner.config.vae_sha256 == ours[0]
        told = [line for line in caplog.messages if "aligner" in line]
        assert told == [] if words is None else words in told[0]
