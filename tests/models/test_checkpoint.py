"""Loading checkpoints: what is read, what is refused, and what the errors say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from hcma_fast.config import PRESETS
from hcma_fast.errors import InputError, WeightsError
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.sampling.exported import graph_of
from hcma_fast.specs import GRAPH_NAMES, STEP_NAMES

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"
WEIGHT_FILES = (UNET_FILE, VAE_FILE, TEXT_FILE, "aligner/model.safetensors")


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the random checkpoint that a test may damage."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_loads_every_part_frozen_in_float32(random_components: Components) -> None:
    parts = random_components
    assert (parts.preset, parts.image_size, parts.settings.eta0) == ("random", 16, 0.5)
    assert (parts.vae_factor, parts.side_multiple) == (2, 4)
    for module in (parts.text_encoder, parts.unet, parts.vae, parts.aligner):
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())


@torch.no_grad()
def test_graphs_follow_their_specs(random_components: Components) -> None:
    specs, graphs = random_components.specs(), random_components.graphs()
    assert tuple(graphs) == GRAPH_NAMES and tuple(specs) == (*GRAPH_NAMES, *STEP_NAMES)
    batch = 2
    for name, spec in specs.items():
        inputs = [
            torch.zeros(
                [batch if size == "batch" else int(size) for size in tensor.shape],
                dtype=getattr(torch, tensor.dtype),
            )
            for tensor in spec.inputs
        ]
        outputs = graph_of(random_components, name)(*inputs)
        assert isinstance(outputs, tuple)
        for output, tensor in zip(outputs, spec.outputs, strict=True):
            expected = tuple(batch if size == "batch" else size for size in tensor.shape)
            assert tuple(output.shape) == expected, (name, tensor.name)
            assert output.isfinite().all()


@pytest.mark.parametrize("side", [0, -16, 15, 18])
def test_refuses_sizes_the_model_cannot_do(random_components: Components, side: int) -> None:
    with pytest.raises(InputError, match="image sides"):
        random_components.specs(height=side or -4)


@torch.no_grad()
def test_another_image_size(random_components: Components) -> None:
    height, width, batch = 24, 32, 2
    specs = random_components.specs(height, width)
    generator = torch.Generator().manual_seed(0)
    for name, spec in specs.items():
        inputs = random_inputs(spec, batch, generator, len(random_components.tokenizer))
        module = graph_of(random_components, name, height, width)
        outputs = module(*(inputs[tensor.name] for tensor in spec.inputs))
        for output, tensor in zip(outputs, spec.outputs, strict=True):
            expected = tuple(batch if size == "batch" else size for size in tensor.shape)
            assert tuple(output.shape) == expected, (name, tensor.name)
            assert output.isfinite().all()
    # a box that covers the left half has no weight in the right half, at any size
    box = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]])
    regions = random_components.aligner.region_map(box, torch.ones(1, 1), (6, 8)).view(6, 8)
    assert regions[:, :4].min() > 0 and regions[:, 4:].abs().max() == 0


def test_half_precision_files_become_float32(checkpoint: Path) -> None:
    for name in WEIGHT_FILES:
        edit_weights(checkpoint / name, lambda s: {k: v.half() for k, v in s.items()})
    parts = load_components(checkpoint)
    stored = load_file(checkpoint / UNET_FILE)
    for name, value in parts.unet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float())
    assert next(parts.text_encoder.parameters()).dtype == torch.float32
    assert next(parts.vae.parameters()).dtype == torch.float32
    assert next(parts.aligner.parameters()).dtype == torch.float32


def test_loads_the_fp16_variant_when_it_is_the_only_one(checkpoint: Path) -> None:
    for name in (UNET_FILE, VAE_FILE, TEXT_FILE):
        path = checkpoint / name
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert load_components(checkpoint).unet.dtype == torch.float32


def write_gligen_folder(source: Path, folder: Path) -> None:
    """A GLIGEN SD1.4 folder as on the hub: legacy tokenizer and text keys, no aligner."""
    UNet2DConditionModel.from_pretrained(source / "unet").save_pretrained(folder / "unet")
    AutoencoderKL.from_pretrained(source / "vae").save_pretrained(folder / "vae")
    CLIPTextModel.from_pretrained(source / "text_encoder").save_pretrained(folder / "text_encoder")
    edit_weights(
        folder / TEXT_FILE,
        lambda s: (
            {f"text_model.{k.removeprefix('text_model.')}": v for k, v in s.items()}
            | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        ),
    )
    edit_json(folder / "text_encoder/config.json", architectures=["CLIPTextModel"])
    model = json.loads((source / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    index = {
        "_class_name": "StableDiffusionGLIGENPipeline",
        "_diffusers_version": "0.20.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    # beside the safetensors, and in parts that we never open, pickles do no harm
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/pytorch_model.bin").write_bytes(b"pickle")
    (folder / "gligen.ckpt").write_bytes(b"pickle")


def test_loads_a_gligen_sd14_folder_with_an_aligner_from_elsewhere(
    random_checkpoint: Path, random_components: Components, tmp_path: Path
) -> None:
    folder = tmp_path / "gligen"
    folder.mkdir()
    write_gligen_folder(random_checkpoint, folder)
    bare = load_components(folder)
    assert bare.aligner is None and bare.info.alignment.eta0 == 0
    with pytest.raises(WeightsError, match=r"no aligner.*aligner="):
        _ = bare.own_aligner
    parts = load_components(folder, aligner=random_checkpoint / "aligner")
    assert (parts.preset, parts.image_size) == ("sd14", 16)
    for ours, expected in (
        (parts.text_encoder, random_components.text_encoder),
        (parts.unet, random_components.unet),
        (parts.vae, random_components.vae),
    ):
        for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)
    text = "a dog, beside: 2 PIZZAS"
    assert parts.tokenizer(text).input_ids == random_components.tokenizer(text).input_ids


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_names_a_missing_part(checkpoint: Path, part: str) -> None:
    shutil.rmtree(checkpoint / part)
    with pytest.raises(WeightsError, match=f"lacks {part}"):
        load_components(checkpoint)


@pytest.mark.parametrize("name", WEIGHT_FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing", "key", "shape"])
def test_refuses_damaged_weights(checkpoint: Path, name: str, damage: str) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "key":
        edit_weights(path, lambda s: {k: v for k, v in s.items() if k != sorted(s)[3]})
    elif damage == "shape":
        edit_weights(path, lambda s: {**s, sorted(s)[3]: torch.zeros(3, 5)})
    else:
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 4096}[
                damage
            ]
        )
    with pytest.raises(WeightsError) as caught:
        load_components(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "text_encoder/config.json",
        "hcma.json",
        "aligner/config.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("content", ["{", "[]", '{"sample_size": "x", "format": 7}'])
def test_refuses_damaged_configs(checkpoint: Path, name: str, content: str) -> None:
    (checkpoint / name).write_text(content)
    with pytest.raises(WeightsError):
        load_components(checkpoint)


def test_refuses_a_tokenizer_without_vocabulary(checkpoint: Path) -> None:
    (checkpoint / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="tokenizer"):
        load_components(checkpoint)


def test_refuses_pickles_unread(checkpoint: Path) -> None:
    """But for the .bin files of diffusers and transformers, which a process of its own converts."""
    for part in ("unet", "text_encoder", "vae", "aligner"):
        (path,) = (checkpoint / part).glob("*.safetensors")
        for suffix in (".pt", ".ckpt", ".pkl", *([".bin"] if part == "aligner" else [])):
            moved = path.rename(path.with_suffix(suffix))
            with pytest.raises(WeightsError, match=r"run code.*safetensors"):
                load_components(checkpoint)
            moved.rename(path)


def test_refuses_a_folder_of_one_pickle(tmp_path: Path) -> None:
    (tmp_path / "sd-v1-4.ckpt").write_bytes(b"pickle")
    with pytest.raises(WeightsError, match=r"sd-v1-4\.ckpt"):
        load_components(tmp_path)


@pytest.mark.parametrize("name", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_refuses_remote_code(checkpoint: Path, name: str) -> None:
    edit_json(checkpoint / name, auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(WeightsError, match="code of its own"):
        load_components(checkpoint)


def test_refuses_custom_classes_in_the_index(checkpoint: Path) -> None:
    (checkpoint / "model_index.json").write_text(json.dumps({"unet": ["evil", "Model"]}))
    with pytest.raises(WeightsError, match="code of its own"):
        load_components(checkpoint)


def test_refuses_parts_that_do_not_fit(checkpoint: Path) -> None:
    hcma = checkpoint / "hcma.json"
    edit_json(hcma, image_size=32)
    with pytest.raises(WeightsError, match="latent size"):
        load_components(checkpoint)
    edit_json(hcma, image_size=16)
    edit_json(checkpoint / "unet/config.json", attention_type="gated-text-image")
    with pytest.raises(WeightsError):
        load_components(checkpoint)


def test_refuses_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="tiny"):
        load_components("giant")
    with pytest.raises(WeightsError, match="no such"):
        load_components(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="no checkpoint but an empty file"):
        load_components(tmp_path / "file", aligner=PRESETS["tiny"] / "aligner")


def test_a_hub_id_offline_fails_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"network.*folder") as caught:
        load_components("masterful/hcma-fast-is-not-in-any-cache", offline=True)
    assert caught.value.value == "masterful/hcma-fast-is-not-in-any-cache"


def test_a_hub_id_is_resolved_through_the_hub(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, local_files_only: bool, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(random_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_components("someone/model").source == random_checkpoint
    assert asked[0][0] == "someone/model"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked[0][1])


def test_hash_follows_contents_not_place(
    random_components: Components, checkpoint: Path, tmp_path: Path
) -> None:
    original = random_components.weights_hash
    (checkpoint / "README.md").write_text("not part of the weights")
    assert load_components(checkpoint).weights_hash == original
    moved = tmp_path / "aligner-elsewhere"
    (checkpoint / "aligner").rename(moved)
    assert load_components(checkpoint, aligner=moved).weights_hash == original
    edit_weights(checkpoint / VAE_FILE, lambda s: {**s, sorted(s)[0]: s[sorted(s)[0]] + 1})
    assert load_components(checkpoint, aligner=moved).weights_hash != original
