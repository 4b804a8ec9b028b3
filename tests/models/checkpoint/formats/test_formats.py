"""Every format that people hold gives the same model as diffusers' folder of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.models.checkpoint.formats.architecture import (
    TEXT,
    UNET,
    VAE,
    text_config,
    unet_config,
    vae_config,
)
from hcma_fast.models.checkpoint.formats.names import unet_names, vae_names
from hcma_fast.models.checkpoint.options import ModelOptions
from hcma_fast.models.checkpoint.tokenizer import clip_tokenizer

from original_files import (
    WIDTH,
    check_equal,
    drawn,
    grounding_layers,
    make_aligner,
    make_parts,
    single_file,
    text_state,
    unet_state,
    vae_state,
)


@pytest.fixture(scope="module")
def expected(formats: Path) -> Components:
    return load_components(formats / "gated", aligner=formats / "aligner")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))


def test_names_and_shapes_of_the_full_size_model() -> None:
    """Every weight of the real SD 1.4 with GLIGEN, by its original name, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET).state_dict()
        vae = AutoencoderKL(**VAE).state_dict()
        text = CLIPTextModel(CLIPTextConfig(**TEXT)).state_dict()
    original = unet_state(unet)
    plain = [key for key in original if key not in grounding_layers(original)]
    # as published: 686 tensors in the UNet, 248 in the VAE, 197 in the text encoder
    assert (len(plain), len(vae), len(text_state(text))) == (686, 248, 197)
    assert sum(value.numel() for value in grounding_layers(original).values()) == 209_102_240
    names = unet_names(original, 4, 2)
    assert {names[key]: value.shape for key, value in original.items()} == {
        name: value.shape for name, value in unet.items()
    }
    # an adapter has some layers only
    some = grounding_layers(original)
    assert unet_names(some, 4, 2) == {key: names[key] for key in some}
    autoencoder = vae_state(vae)
    assert "decoder.mid.attn_1.proj_out.weight" in autoencoder
    places = vae_names(autoencoder, 4)
    assert {places[key]: tuple(v.shape[:2]) for key, v in autoencoder.items()} == {
        name: tuple(value.shape[:2]) for name, value in vae.items()
    }
    for config, ours, state in (
        (unet_config, UNET, original),
        (vae_config, VAE, autoencoder),
        (text_config, TEXT, {k.removeprefix("text_model."): v for k, v in text.items()}),
    ):
        found = config({key: tuple(value.shape) for key, value in state.items()}, Path("x"))
        assert {key: found[key] for key in ours} == ours


def test_clips_own_tokenizer() -> None:
    """Ids as OpenAI's code gives them."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("hello world!", padding="max_length", max_length=77).input_ids
    assert padded == [49406, 3306, 1002, 256, *[49407] * 73]


def test_every_format_is_the_same_model(
    formats: Path, expected: Components, tmp_path: Path
) -> None:
    plain, adapter = formats / "plain.safetensors", formats / "adapter.safetensors"
    shutil.copy(formats / "gated.safetensors", tmp_path / "no-suffix")
    half = {k: v.half() for k, v in load_file(formats / "adapter.safetensors").items()}
    save_file(half, tmp_path / "half.safetensors")
    for model, options in (
        (formats / "gated.safetensors", None),
        (tmp_path / "no-suffix", None),
        (formats / "gligen.pth", None),
        (plain, ModelOptions(gligen=adapter)),
        (plain, ModelOptions(gligen=formats / "adapter-diffusers.safetensors")),
        (plain, ModelOptions(gligen=formats / "gligen.pth")),
        (formats / "plain", ModelOptions(gligen=adapter)),
        (formats / "gated", ModelOptions(gligen=adapter)),
        (plain, ModelOptions(gligen=adapter, vae=formats / "vae.safetensors")),
        (plain, ModelOptions(gligen=adapter, vae=formats / "gated.safetensors")),
    ):
        parts = load_components(model, aligner=formats / "aligner", options=options)
        check_equal(parts, expected)
        assert (parts.preset, parts.image_size, parts.clip_skip) == ("sd14", 64, 1)
    parts = load_components(
        plain,
        aligner=formats / "aligner",
        options=ModelOptions(gligen=tmp_path / "half.safetensors"),
    )
    name = "position_net.linears.0.weight"
    assert torch.equal(parts.unet.state_dict()[name], half[name].float())


def test_what_training_programs_pickle_beside_the_weights(
    formats: Path, expected: Components, tmp_path: Path
) -> None:
    """SD's own .ckpt names Lightning's callback, GLIGEN's omegaconf: both read as nothing."""
    import sys
    import types

    state = load_file(formats / "gated.safetensors")
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    checkpoint_class = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = checkpoint_class  # type: ignore[attr-defined]
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", module.__name__]
    sys.modules.update({name: module for name in names})
    try:
        content = {
            "state_dict": state,
            "global_step": 7,
            "callbacks": {checkpoint_class: {"best": checkpoint_class()}},
            "optimizer_states": [{"momentum": torch.zeros(9)}],
        }
        torch.save(content, tmp_path / "sd.ckpt")
        # as torch wrote before 1.6
        torch.save(
            {"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False
        )
    finally:
        for name in names:
            del sys.modules[name]
    for name in ("sd.ckpt", "old.ckpt"):
        check_equal(load_components(tmp_path / name, aligner=formats / "aligner"), expected)


def test_a_pickle_is_converted_once(formats: Path, tmp_path: Path) -> None:
    parts = load_components(formats / "gligen.pth", aligner=formats / "aligner")
    converted = list((tmp_path / "cache/converted").glob("*.safetensors"))
    assert len(converted) == 1 and not list((tmp_path / "cache/converted").glob("*.part"))
    written = converted[0].stat().st_mtime_ns
    again = load_components(formats / "gligen.pth", aligner=formats / "aligner")
    assert converted[0].stat().st_mtime_ns == written
    assert again.weights_hash == parts.weights_hash


def test_a_folder_of_pickles(formats: Path, expected: Components, tmp_path: Path) -> None:
    """As masterful/gligen-1-4-generation-text-box: .bin alone, in two precisions."""
    folder = Path(shutil.copytree(formats / "gated", tmp_path / "pickles"))
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ):
        (file,) = (folder / part).glob("*.safetensors")
        state = load_file(file)
        file.unlink()
        torch.save(state, folder / part / f"{stem}.bin")
        torch.save({k: v.half() for k, v in state.items()}, folder / part / f"{stem}.fp16.bin")
    config = folder / "unet/config.json"
    config.write_text(
        config.read_text().replace('"attention_type": "gated"', '"use_gated_attention": true')
    )
    check_equal(load_components(folder, aligner=formats / "aligner"), expected)


def test_clip_skip_reads_the_caption_earlier_and_the_phrases_at_the_end(
    formats: Path, expected: Components
) -> None:
    parts = load_components(
        formats / "gated", aligner=formats / "aligner", options=ModelOptions(clip_skip=2)
    )
    encoder = expected.text_encoder
    ids = torch.tensor(
        clip_tokenizer()(["a dog", "a cat"], padding="max_length", max_length=77).input_ids
    )
    with torch.no_grad():
        states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
        hidden = encoder.final_layer_norm(states[-2])
    ours, usual = drawn(parts), drawn(expected)
    assert (ours["hidden"] - hidden).abs().max() < 1e-6
    assert torch.equal(ours["pooled"], usual["pooled"])
    assert (ours["hidden"] - usual["hidden"]).abs().max() > 1e-3
    assert parts.info.clip_skip == 2 and parts.weights_hash != expected.weights_hash
    for wrong in (0, 13, 2.0, True):
        with pytest.raises(WeightsError, match="clip_skip"):
            ModelOptions(clip_skip=wrong)  # type: ignore[arg-type]


def test_the_hash_follows_every_file(formats: Path, tmp_path: Path) -> None:
    base = formats / "plain.safetensors"
    adapter = load_file(formats / "adapter.safetensors")
    name = sorted(adapter)[0]
    save_file({**adapter, name: adapter[name] + 1}, tmp_path / "other.safetensors")
    hashes = {
        load_components(base, aligner=formats / "aligner", options=options).weights_hash
        for options in (
            ModelOptions(gligen=formats / "adapter.safetensors"),
            ModelOptions(gligen=tmp_path / "other.safetensors"),
            ModelOptions(gligen=formats / "adapter.safetensors", vae=formats / "vae.safetensors"),
            ModelOptions(gligen=formats / "adapter.safetensors", clip_skip=1),
        )
    }
    assert len(hashes) == 4


def test_keys_of_no_part_are_named(formats: Path, tmp_path: Path) -> None:
    state = load_file(formats / "gated.safetensors")
    zero = torch.zeros(2)
    harmless = {"model_ema.diffusion_modelout0weight": zero, "first_stage_model.loss.logvar": zero}
    save_file({**state, **{k: v.clone() for k, v in harmless.items()}}, tmp_path / "ema")
    load_components(tmp_path / "ema", aligner=formats / "aligner")
    extra = {f"foreign.{number:02}": torch.zeros(2) for number in range(12)}
    inside = {"model.diffusion_model.input_blocks.1.9.weight": torch.zeros(2)}
    for more, count, shown in (
        (extra, 12, "foreign.00, foreign.01"),
        (inside, 1, "input_blocks.1.9"),
    ):
        save_file({**state, **more}, tmp_path / "more.safetensors")
        with pytest.raises(WeightsError, match=rf"takes {count} weights: .*{shown}") as caught:
            load_components(tmp_path / "more.safetensors", aligner=formats / "aligner")
        assert "foreign.10" not in str(caught.value)
    lost = [key for key in state if key.startswith("model.diffusion_model.position_net.")]
    save_file({k: v for k, v in state.items() if k not in lost}, tmp_path / "less.safetensors")
    with pytest.raises(WeightsError, match=rf"unet lacks {len(lost)} weights: position_net"):
        load_components(tmp_path / "less.safetensors", aligner=formats / "aligner")


def test_an_adapter_of_another_width_or_kind(formats: Path, tmp_path: Path) -> None:
    aligner = formats / "aligner"
    wide = unet_state(make_parts(gated=True, width=2 * WIDTH)["unet"].state_dict())
    save_file(grounding_layers(wide), tmp_path / "wide.safetensors")
    base = formats / "plain.safetensors"
    for adapter, problem in (
        (tmp_path / "wide.safetensors", r"another shape.*\[\d+, 128\], where the model has"),
        (formats / "vae.safetensors", "no GLIGEN layers"),
        (formats / "plain.safetensors", "no GLIGEN layers"),
        (tmp_path / "nowhere", "no such file"),
    ):
        with pytest.raises(WeightsError, match=problem) as caught:
            load_components(base, aligner=aligner, options=ModelOptions(gligen=adapter))
        assert adapter.name in str(caught.value) and caught.value.exit_code == 3


def test_parts_alone_say_what_they_are_for(formats: Path, tmp_path: Path) -> None:
    parts = make_parts(gated=False)
    save_file(unet_state(parts["unet"].state_dict()), tmp_path / "unet.safetensors")
    whole = single_file(parts)
    first = {k: v for k, v in whole.items() if not k.startswith("cond_stage_model.")}
    save_file(first, tmp_path / "no-text.safetensors")
    for file, problem in (
        (formats / "adapter.safetensors", "GLIGEN's layers alone.*gligen="),
        (formats / "vae.safetensors", "a VAE alone.*vae="),
        (tmp_path / "unet.safetensors", "a UNet alone"),
        (tmp_path / "no-text.safetensors", "has no text_encoder"),
    ):
        with pytest.raises(WeightsError, match=problem):
            load_components(file, aligner=formats / "aligner")
    with pytest.raises(WeightsError, match=re.compile("there is no VAE in this file")):
        load_components(
            formats / "gated",
            aligner=formats / "aligner",
            options=ModelOptions(vae=formats / "adapter.safetensors"),
        )
    assert make_aligner().config.text_width == WIDTH
