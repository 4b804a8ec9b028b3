"""Files beside the weights: keys and classes that are refused, schedules, leftovers, encodings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.configs import PART_KINDS, PartName
from hcma_fast.models.checkpoint.folder import Components, load_components, locate
from hcma_fast.models.checkpoint.info import check_safe, hash_weights
from hcma_fast.models.checkpoint.json_files import read_json
from hcma_fast.schedule import BETA_END, BETA_START, TRAIN_STEPS
from hcma_fast.train.data.encoders import Encoders

SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the random checkpoint that a test may damage."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(path: Path, key: str, value: object, folder: Path) -> str:
    """The message on ``key`` in a file, which is put back."""
    before = path.read_bytes() if path.exists() else None
    if before is None:
        path.write_text("{}")
    edit(path, lambda data: data.update({key: value}))
    with pytest.raises(WeightsError) as caught:
        locate(folder)
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)
    return str(caught.value)


CODE_KEYS = {
    "attn_implementation": "stranger/kernels",
    "_attn_implementation": "stranger/kernels",
    "auto_map": {"AutoModel": "evil.Model"},
    "quantization_config": {"quant_method": "bitsandbytes"},
    "custom_pipeline": "stranger/pipeline",
    "a_key_of_next_year": 1,
}


def test_only_listed_keys_pass_in_every_config(checkpoint: Path) -> None:
    for name in (
        *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
        *("text_encoder/generation_config.json", "tokenizer/tokenizer_config.json"),
        *("tokenizer/special_tokens_map.json", "tokenizer/tokenizer.json"),
    ):
        for key, value in CODE_KEYS.items():
            message = refused(checkpoint / name, key, value, checkpoint)
            assert key in message and "code of its own" in message and name in message
    for key in ("auto_map", "custom_pipeline"):
        assert key in refused(checkpoint / "model_index.json", key, {"a": "b"}, checkpoint)
    aligner = checkpoint / "aligner/config.json"
    for key, value in CODE_KEYS.items():
        before = aligner.read_bytes()
        edit(aligner, lambda data, key=key, value=value: data.update({key: value}))
        with pytest.raises(WeightsError, match=key):
            load_components(checkpoint)
        aligner.write_bytes(before)
    locate(checkpoint)


def test_every_key_that_the_libraries_write_passes() -> None:
    """The lists and the installed classes agree; another release may add keys."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig

    written: dict[PartName, set[str]] = {
        "unet": set(UNet2DConditionModel().config),
        "vae": set(AutoencoderKL().config),
        "text_encoder": set(CLIPTextConfig().to_dict()),
    }
    for part, keys in written.items():
        kind = PART_KINDS[part]
        extra = {"_use_default_values"} if part != "text_encoder" else set()
        assert keys - extra <= kind.used | kind.ignored, part


def test_a_part_of_another_class_is_named(checkpoint: Path) -> None:
    for part, key, value, name in (
        ("vae", "_class_name", "AutoencoderTiny", "AutoencoderTiny"),
        ("vae", "_class_name", ["pipeline", "Mine"], "Mine"),
        ("unet", "_class_name", "SD3Transformer2DModel", "SD3Transformer2DModel"),
        ("text_encoder", "architectures", ["T5EncoderModel"], "T5EncoderModel"),
    ):
        message = refused(checkpoint / part / "config.json", key, value, checkpoint)
        assert name in message and f"the {part} is of the class" in message
        assert PART_KINDS[part].classes[0] in message  # type: ignore[index]
    tokenizer = checkpoint / "tokenizer/tokenizer_config.json"
    edit(tokenizer, lambda data: data.update(tokenizer_class="T5Tokenizer"))
    with pytest.raises(WeightsError, match=r"T5Tokenizer.*CLIPTokenizer"):
        load_components(checkpoint)
    index = checkpoint / "model_index.json"
    for part, value, word in (
        ("vae", ["diffusers", "AutoencoderTiny"], "AutoencoderTiny"),
        ("unet", [["evil"], "X"], "code of its own"),
        ("unet", "evil", "code of its own"),
        ("text_encoder", ["transformers", ["X"]], "X"),
    ):
        assert word in refused(index, part, value, checkpoint)


def test_values_that_we_do_not_do_are_refused(checkpoint: Path) -> None:
    for part, key, value in (
        ("unet", "class_embed_type", "timestep"),
        ("unet", "time_cond_proj_dim", 256),
        ("unet", "layers_per_block", 10**9),
        ("unet", "transformer_layers_per_block", [1, [1, 999]]),
        ("unet", "block_out_channels", [10**9, 10**9]),
        ("unet", "block_out_channels", [16] * 40),
        ("unet", "norm_eps", "small"),
        ("unet", "sample_size", "x"),
        ("unet", "sample_size", 0),
        ("vae", "shift_factor", 0.1),
        ("vae", "scaling_factor", "x"),
        ("vae", "scaling_factor", 0),
        ("vae", "latents_mean", [0.0, 1.0]),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "hidden_size", 10**30),
    ):
        path = checkpoint / part / "config.json"
        before = path.read_bytes()
        edit(path, lambda data, key=key, value=value: data.update({key: value}))
        with pytest.raises(WeightsError) as caught:
            load_components(checkpoint)
        path.write_bytes(before)
        assert key in str(caught.value), (key, value)


def test_older_names_of_gated_attention(
    checkpoint: Path, random_components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint / "unet/config.json"
    original = json.loads(path.read_text())
    for key in ("use_gated_attention", "enable_gligen"):
        config = {**original, key: True, "_diffusers_version": "0.15.0.dev0"}
        del config["attention_type"]
        path.write_text(json.dumps(config))
        unet = load_components(checkpoint).unet
        assert unet.config.attention_type == "gated"
        expected = random_components.unet.state_dict()
        assert all((expected[name] == value).all() for name, value in unet.state_dict().items())
        for switch, kind in ((True, "default"), ("yes", "gated")):
            path.write_text(json.dumps({**original, key: switch, "attention_type": kind}))
            with pytest.raises(WeightsError, match="gated"):
                locate(checkpoint)
    path.write_text(json.dumps({**original, "use_gated_attention": False}))
    locate(checkpoint)


def test_schedules_that_ours_does_not_do_are_named(checkpoint: Path) -> None:
    path = checkpoint / "scheduler/scheduler_config.json"
    path.parent.mkdir()
    for key, value in (
        ("prediction_type", "v_prediction"),
        ("prediction_type", "sample"),
        ("beta_start", 0.0001),
        ("beta_end", 0.02),
        ("beta_end", "0.012"),
        ("beta_schedule", "linear"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("num_train_timesteps", 2000),
        ("rescale_betas_zero_snr", True),
        ("steps_offset", 0),
        ("thresholding", True),
        ("trained_betas", [0.1] * 1000),
        ("trained_betas", "x"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("_class_name", "LCMScheduler"),
        ("_class_name", ["a"]),
    ):
        path.write_text(json.dumps({**SD1_SCHEDULER, key: value}))
        for read in (locate, lambda folder: Encoders.load(folder, None)):  # type: ignore[arg-type]
            with pytest.raises(WeightsError) as caught:
                read(checkpoint)
            assert key in str(caught.value) and str(path) in str(caught.value)
            assert str(value)[:20] in str(caught.value)
    # a file without a key means the default of diffusers, which is another schedule
    path.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(WeightsError, match=r"beta_start is 0\.0001, the default"):
        locate(checkpoint)


def test_schedules_that_are_ours_pass_and_change_nothing(checkpoint: Path) -> None:
    before = locate(checkpoint).weights_hash
    path = checkpoint / "scheduler/scheduler_config.json"
    path.parent.mkdir()
    values = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    root = (BETA_START**0.5, BETA_END**0.5)
    step = (root[1] - root[0]) / (TRAIN_STEPS - 1)
    betas = [(root[0] + i * step) ** 2 for i in range(TRAIN_STEPS)]
    for config in (
        SD1_SCHEDULER,
        {key: value for key, value in SD1_SCHEDULER.items() if key != "steps_offset"},
        {**SD1_SCHEDULER, "trained_betas": betas, "beta_start": 1.0},
        *(
            json.loads(kind(**values).to_json_string())
            for kind in (PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler)
        ),
    ):
        path.write_text(json.dumps(config))
        assert locate(checkpoint).weights_hash == before


def test_what_is_not_used_is_told_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_safe(checkpoint)
    for name in ("README.md", "LICENSE", ".gitattributes", "unet/._config.json"):
        (checkpoint / name).write_bytes(b"\xff\x00")
    for name in ("safety_checker", "feature_extractor", ".cache"):
        (checkpoint / name).mkdir()
    check_safe(checkpoint)
    assert caplog.messages == []
    (checkpoint / "pytorch_lora_weights.safetensors").write_bytes(b"lora")
    (checkpoint / "controlnet").mkdir()
    (checkpoint / "unet/more_lora.safetensors").write_bytes(b"lora")
    for _ in range(3):
        locate(checkpoint)
    assert len(caplog.messages) == 1
    for name in ("pytorch_lora_weights.safetensors", "controlnet", "unet/more_lora.safetensors"):
        assert name in caplog.messages[0]


def test_what_macos_leaves_behind_is_not_read(checkpoint: Path) -> None:
    before = locate(checkpoint).weights_hash
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\xff\xfe")
    (checkpoint / "unet/.DS_Store").write_bytes(b"\x00")
    assert load_components(checkpoint).weights_hash == before


def test_byte_order_marks_and_other_encodings(
    checkpoint: Path, random_components: Components
) -> None:
    names = [path.relative_to(checkpoint) for path in sorted(checkpoint.rglob("*.json"))]
    assert len(names) == 7
    for name in names:
        path = checkpoint / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    parts = load_components(checkpoint)
    assert parts.settings == random_components.settings
    assert parts.tokenizer("a dog").input_ids == random_components.tokenizer("a dog").input_ids
    for name in names:
        path = checkpoint / name
        before = path.read_bytes()
        path.write_bytes(before.decode("utf-8-sig").encode("utf-16"))
        with pytest.raises(WeightsError, match="UTF-16"):
            load_components(checkpoint)
        path.write_bytes(before)


def test_entries_that_are_no_files(checkpoint: Path) -> None:
    """A fifo would block for ever, and a device never end."""
    for name in (
        *("unet/config.json", "vae/diffusion_pytorch_model.safetensors", "hcma.json"),
        *("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "aligner/config.json"),
        *("aligner/model.safetensors", "scheduler/scheduler_config.json", "model_index.json"),
    ):
        path = checkpoint / name
        path.parent.mkdir(exist_ok=True)
        before = path.read_bytes() if path.exists() else None
        for make in (os.mkfifo, os.mkdir, lambda place: os.symlink("/dev/zero", place)):
            path.unlink(missing_ok=True)
            make(path)
            with pytest.raises(WeightsError, match=path.name):
                load_components(checkpoint)
            path.rmdir() if path.is_dir() else path.unlink()
        if before is not None:
            path.write_bytes(before)
    load_components(checkpoint)


def test_lfs_pointers_are_named(checkpoint: Path) -> None:
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9\nsize 9\n"
    )
    for name in (
        *("unet/diffusion_pytorch_model.safetensors", "aligner/model.safetensors"),
        *("tokenizer/tokenizer.json", "text_encoder/config.json"),
    ):
        path = checkpoint / name
        before = path.read_bytes()
        path.write_bytes(pointer)
        with pytest.raises(WeightsError, match=r"LFS pointer.*git lfs pull"):
            locate(checkpoint)
        path.write_bytes(before)


def test_json_that_breaks_readers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, problem in (
        ("[" * 100_000, "nests more"),
        ("[" * 200 + "]" * 200, "nests more"),
        ('{"a":' * 70 + "1" + "}" * 70, "nests more"),
        ('{"a": 1' + "0" * 5000 + "}", "digits"),
        ('{"a": 1e999}', "finite"),
        ('{"a": NaN}', "finite"),
        ('{"a": 1, "a": 2}', "twice"),
        ("", "JSON"),
        ('{"a": "' + "x" * 2**21 + '"}', "more than 1 MiB"),
    ):
        path.write_text(text)
        with pytest.raises(WeightsError, match=problem) as caught:
            read_json(path)
        assert len(str(caught.value)) < 500
    path.write_text('{"a": [1, 2.5, true, null, "x", {"b": -1000000000000000019884624838656}]}')
    assert read_json(path)["a"][5]["b"] == -(10**30) - 19884624838656


def test_hash_ignores_what_is_not_read(checkpoint: Path) -> None:
    before = hash_weights(checkpoint, checkpoint / "aligner")
    (checkpoint / "unet/.hidden.json").write_text("{}")
    (checkpoint / "scheduler").mkdir()
    (checkpoint / "scheduler/scheduler_config.json").write_text(json.dumps(SD1_SCHEDULER))
    assert hash_weights(checkpoint, checkpoint / "aligner") == before
