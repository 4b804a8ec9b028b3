"""A model of any format as a folder of ours, and back again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from hcma_fast.cli.app import main
from hcma_fast.errors import OutputError
from hcma_fast.models.checkpoint.convert import convert, describe
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.models.checkpoint.located import locate
from hcma_fast.models.checkpoint.options import ModelOptions
from hcma_fast.runtime.pipeline import HCMAPipeline

from original_files import check_equal

NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))


def test_the_folder_is_the_same_model(formats: Path, tmp_path: Path) -> None:
    options = ModelOptions(gligen=formats / "adapter.safetensors", clip_skip=2)
    base = formats / "plain.safetensors"
    checkpoint = locate(base, aligner=formats / "aligner", options=options)
    out = tmp_path / "out"
    written = convert(checkpoint, str(base), out)
    parts, again = load_components(checkpoint), load_components(out)
    assert written.origin is not None and written.origin.source == "plain.safetensors"
    check_equal(again, parts)
    assert again.info.clip_skip == 2 and again.image_size == parts.image_size
    for part in ("unet", "vae", "text_encoder"):
        one, other = getattr(again, part).state_dict(), getattr(parts, part).state_dict()
        assert list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)
    info = json.loads((out / "hcma.json").read_text())
    origin = info["origin"]
    assert (origin["source"], origin["dtype"]) == ("plain.safetensors", "float32")
    assert origin["format"] == "single file of Stable Diffusion 1.x"
    assert origin["files"]["plain.safetensors"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert set(origin["files"]) >= {"gligen.safetensors", "aligner/model.safetensors"}
    # no path of this machine
    assert str(formats) not in "".join(p.read_text() for p in out.rglob("*.json"))
    lines = [line.split("  ") for line in (out / "sha256.txt").read_text().splitlines()]
    assert len(lines) == len([p for p in out.rglob("*") if p.is_file()]) - 1
    for digest, name in lines:
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    with pytest.raises(OutputError, match="something in this place"):
        convert(checkpoint, str(base), out)


def test_the_command(formats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, aligner = tmp_path / "out", str(formats / "aligner")
    given = ["convert", str(formats / "gligen.pth"), "--aligner", aligner, "--out", str(out)]
    assert main([*given, "--dry-run", "--json"]) == 0
    assert not out.exists()
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "original GLIGEN checkpoint" and report["grounding"]
    assert main([*given, "--dtype", "fp16"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    (file,) = (out / "unet").glob("*.safetensors")
    stored = load_file(file)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert sum(value.numel() for value in stored.values()) == report["parameters"]["unet"]
    expected = load_components(formats / "gated", aligner=aligner).unet.state_dict()
    assert all(torch.equal(stored[name], value.half()) for name, value in expected.items())
    for wrong, code, message in (
        ([*given], 3, "something in this place"),
        (given[:4], 2, "no folder to write to"),
        ([*given[:5], str(tmp_path / "x"), "--dtype", "int8"], 2, "unknown number format"),
        (["convert", str(formats / "vae.safetensors"), *given[2:5], str(tmp_path / "x")], 3, "VAE"),
        (["convert", "no-such-model", "--dry-run"], 3, "no such preset, folder or file"),
    ):
        assert main(wrong) == code, wrong
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_a_dry_run_finds(formats: Path) -> None:
    for model, options, form, grounding in (
        ("gated.safetensors", ModelOptions(), "single file of Stable Diffusion 1.x", True),
        ("gated", ModelOptions(), "folder in diffusers' layout", True),
        (
            "plain.safetensors",
            ModelOptions(gligen=formats / "adapter.safetensors"),
            "single file of Stable Diffusion 1.x",
            True,
        ),
    ):
        checkpoint = locate(formats / model, aligner=formats / "aligner", options=options)
        found = describe(checkpoint)
        assert (found["format"], found["grounding"]) == (form, grounding)
        parts = load_components(checkpoint)
        for part, count in found["parameters"].items():
            model_of = getattr(parts, part)
            assert count == sum(value.numel() for value in model_of.state_dict().values())


def test_diffusers_loads_the_folder_and_draws(formats: Path, tmp_path: Path) -> None:
    convert(locate(formats / "plain.safetensors"), "plain", tmp_path / "out")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        "a dog", num_inference_steps=3, height=64, width=64, output_type="latent", latents=NOISE
    ).images
    ours = HCMAPipeline.from_components(
        dataclasses.replace(load_components(tmp_path / "out"), image_size=64)
    )
    expected = ours("a dog", num_inference_steps=3, latents=NOISE, output_type="pt").images
    with torch.no_grad():
        image = pipe.vae.decode(drawn / pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert (image.clamp(-1, 1) / 2 + 0.5 - expected).abs().max() < 1e-4
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    convert(locate(formats / "gated.safetensors"), "gated", tmp_path / "gated")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "gated")).__name__ == (
        "StableDiffusionGLIGENPipeline"
    )
