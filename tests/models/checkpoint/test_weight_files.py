"""The files of a part's weights: variants, shards, older names, and what is not of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from hcma_fast.config import PRESETS
from hcma_fast.errors import WeightsError
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer
from hcma_fast.models.checkpoint.weight_files import weight_files

CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the random checkpoint that a test may damage."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


def same(part: object, expected: object) -> bool:
    ours, theirs = (model.state_dict() for model in (part, expected))  # type: ignore[attr-defined]
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_libraries_load_the_same(random_checkpoint: Path) -> None:
    for part, cls in CLASSES.items():
        ours, theirs = (
            load_part(cls, random_checkpoint / part),
            cls.from_pretrained(random_checkpoint / part),
        )
        assert same(ours, theirs) and not ours.training
        assert [name for name, _ in ours.named_buffers()] == [
            name for name, _ in theirs.named_buffers()
        ]
        for (_, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            assert torch.equal(a, b)


def test_every_variant_whole_or_in_shards(
    random_checkpoint: Path, random_components: Components, tmp_path: Path
) -> None:
    patterns = (
        ("{stem}.fp16.safetensors", torch.float16),
        ("{stem}.bf16.safetensors", torch.bfloat16),
        ("{stem}-{shard}.safetensors", torch.float32),
        ("{stem}.fp16-{shard}.safetensors", torch.float16),
        ("{stem}-{shard}.fp16.safetensors", torch.float16),
        ("{stem}.bf16-{shard}.safetensors", torch.bfloat16),
    )
    for number, (pattern, dtype) in enumerate(patterns):
        for part, cls in CLASSES.items():
            folder = tmp_path / str(number) / part
            folder.mkdir(parents=True)
            shutil.copy(random_checkpoint / part / "config.json", folder)
            stem = STEMS.get(part, "model")
            state = load_file(random_checkpoint / part / f"{stem}.safetensors")
            state = {name: value.to(dtype) for name, value in state.items()}
            count = 3 if "shard" in pattern else 1
            for index in range(count):
                name = pattern.format(stem=stem, shard=f"{index + 1:05}-of-{count:05}")
                save_file({key: state[key] for key in sorted(state)[index::count]}, folder / name)
            loaded = load_part(cls, folder)
            expected = getattr(random_components, part).state_dict()
            for key, value in loaded.state_dict().items():
                assert value.dtype == torch.float32
                assert torch.equal(value, expected[key].to(dtype).float())
    lost = next((tmp_path / "3/unet").glob("*00002-of-*"))
    lost.unlink()
    with pytest.raises(WeightsError, match="2 of 3 files"):
        load_part(UNet2DConditionModel, tmp_path / "3/unet")


def test_the_most_precise_variant_is_taken(random_checkpoint: Path, tmp_path: Path) -> None:
    names = ["model.bf16.safetensors", "model.fp16.safetensors", "model.safetensors"]
    for name in names:
        (tmp_path / name).touch()
        assert [path.name for path in weight_files(tmp_path)] == [name]
    for name in ("._model.safetensors", "pytorch_lora_weights.safetensors", "model.ckpt"):
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


def test_older_names_of_weights(checkpoint: Path, random_components: Components) -> None:
    """As on the hub: the VAE's attention of 2022, and the text encoder's prefix."""
    path = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, path)
    assert same(load_components(checkpoint).vae, random_components.vae)


def test_weights_of_other_models(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({**state, "lora.up": torch.zeros(2)}, path)
    for _ in range(2):
        load_part(AutoencoderKL, path.parent)
    assert [message for message in caplog.messages if "'lora.up'" in message] == caplog.messages
    assert len(caplog.messages) == 1
    first = sorted(state)[0]
    for change, seen in (
        ({first: state[first].to(torch.int8)}, r"I8 \[16\]"),
        ({first: state[first][None]}, r"F32 \[1, 16\]"),
    ):
        save_file({**state, **change}, path)
        expected = rf"1 weights of another shape.*{first}: {seen}, where the model has \[16\]"
        with pytest.raises(WeightsError, match=expected):
            load_part(AutoencoderKL, path.parent)
    # the same weight in two shards
    for index in (1, 2):
        save_file(
            state, path.with_name(f"diffusion_pytorch_model-0000{index}-of-00002.safetensors")
        )
    path.unlink()
    with pytest.raises(WeightsError, match="twice"):
        load_part(AutoencoderKL, path.parent)


def test_an_aligner_with_foreign_weights_or_shapes(random_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(random_checkpoint / "aligner", tmp_path, dirs_exist_ok=True)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = load_file(file)
    zero = torch.zeros(1)
    many: dict[str, Tensor] = {f"foreign.{'x' * 200}.{i}": zero for i in range(100_000)}
    for weights, problem in (
        ({**state, **many}, "100000 weights of another model"),
        (many, f"lacks {len(state)} weights"),
    ):
        save_file({key: value.clone() for key, value in weights.items()}, file)
        with pytest.raises(WeightsError, match=problem) as caught:
            Aligner.from_pretrained(tmp_path)
        assert len(str(caught.value)) < 500
    save_file(state, file)
    original = json.loads(config.read_text())
    for key in ("depth", "width", "latent_size", "latent_channels", "text_width"):
        for value in (10**9, 10**39, -4, 0, 2**14):
            config.write_text(json.dumps({**original, key: value}))
            with pytest.raises(WeightsError, match="aligner"):
                Aligner.from_pretrained(tmp_path)


def test_tokenizers_give_the_ids_of_transformers(random_checkpoint: Path, tmp_path: Path) -> None:
    texts = [
        "a dog, beside: 2 PIZZAS",
        "",
        "<|endoftext|> x <|startoftext|>",
        "\u00e9 \ufb01 \U0001f415",
    ]
    for source in (PRESETS["tiny"] / "tokenizer", random_checkpoint / "tokenizer"):
        ours, theirs = load_tokenizer(source), CLIPTokenizer.from_pretrained(source)
        for text in texts:
            assert ours(text).input_ids == theirs(text).input_ids
        assert ours.get_vocab() == theirs.get_vocab()
    # the older format, as SD 1.x has it, with a word that textual inversion has added
    model = json.loads((PRESETS["tiny"] / "tokenizer/tokenizer.json").read_text())["model"]
    vocabulary = model["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    word = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False}
    word = {**word, "single_word": False}
    config = {
        **{"bos_token": {**word, "content": "<|startoftext|>"}, "pad_token": "<|endoftext|>"},
        **{"eos_token": {**word, "content": "<|endoftext|>"}, "unk_token": "<|endoftext|>"},
        **{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True},
        **{"errors": "replace", "add_prefix_space": False, "name_or_path": "openai/clip"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for added in ({}, {"<cat-toy>": len(vocabulary)}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        ours, theirs = load_tokenizer(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
        for text in (*texts, "a <cat-toy> on a bed"):
            assert ours(text).input_ids == theirs(text).input_ids
        assert len(ours) == len(vocabulary) + len(added)


def test_token_ids_out_of_range(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer/tokenizer.json"
    original = path.read_text()
    number = len(json.loads(original)["model"]["vocab"])
    for change in (
        {"a": 10**12},
        {"a": -1},
        {"a": "x"},
        {"a": 0.5},
        {"a": number - 1},
        {"another": number + 7},
    ):
        data = json.loads(original)
        data["model"]["vocab"].update(change)
        path.write_text(json.dumps(data))
        with pytest.raises(WeightsError, match="tokenizer"):
            load_components(checkpoint)
    for added in (10**12, -1, number + 1, 3):
        data = json.loads(original)
        data["added_tokens"].append({"id": added, "content": "<new>", "special": True})
        path.write_text(json.dumps(data))
        with pytest.raises(WeightsError, match="tokenizer"):
            load_components(checkpoint)
    # one word more than the text encoder has embeddings
    data = json.loads(original)
    data["added_tokens"].append({"id": number, "content": "<new>", "special": False})
    path.write_text(json.dumps(data))
    with pytest.raises(WeightsError, match="vocabulary"):
        load_components(checkpoint)
    path.write_text(original)
    config = checkpoint / "text_encoder/config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps({**data, "eos_token_id": 5}))
    with pytest.raises(WeightsError, match="end token"):
        load_components(checkpoint)
    config.write_text(json.dumps({**data, "eos_token_id": 2}))
    load_components(checkpoint)
