"""Fixtures that many tests share: a small random model, as a checkpoint folder and loaded."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from filelock import FileLock
from hypothesis import settings
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hcma_fast.config import AlignerConfig, AlignmentSettings
from hcma_fast.export.build import build
from hcma_fast.export.target import Target
from hcma_fast.export.weights_file import WeightsFile
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.models.checkpoint.info import CheckpointInfo, write_info
from hcma_fast.specs import IOSpec

# a loaded machine is no fault of the code
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

_LONGEST = (
    "test_build_backends.py",  # builds the engine that others wait for
    "test_aoti_build.py",
    "test_interpreter.py",
    "test_build_killed.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one that a worker begins last leaves the others with no work."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


WIDTH = 16
LATENT = 8
FACTOR = 2


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over single letters: any ASCII text has tokens, one per letter."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_unet(attention_type: str = "gated") -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        attention_type=attention_type,
    )
    for name, parameter in unet.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            # gates start at 0, which would hide every fault of the grounding
            nn.init.constant_(parameter, 0.5)
    return unet


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=LATENT * FACTOR,
    )


def make_aligner() -> Aligner:
    aligner = Aligner(
        AlignerConfig(
            latent_size=LATENT,
            patch_size=2,
            token_width=16,
            width=32,
            depth=2,
            heads=2,
            text_width=WIDTH,
        )
    )
    if aligner.region_head.gate is not None:
        # the last layer starts at 0, which would hide every fault of the gate
        nn.init.normal_(aligner.region_head.gate[-1].weight, std=0.2)
    return aligner


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint with random weights: 16 x 16 pixels, latents 8 x 8. Do not modify it."""
    folder = tmp_path_factory.mktemp("random-checkpoint")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    make_text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    make_unet().save_pretrained(folder / "unet")
    make_vae().save_pretrained(folder / "vae")
    make_aligner().save_pretrained(folder / "aligner")
    alignment = AlignmentSettings(eta0=0.5, grounding_beta=1.0)
    write_info(
        folder, CheckpointInfo(preset="random", image_size=LATENT * FACTOR, alignment=alignment)
    )
    return folder


@pytest.fixture(scope="session")
def random_components(random_checkpoint: Path) -> Components:
    """The loaded ``random_checkpoint``. Frozen; do not modify it."""
    return load_components(random_checkpoint)


@pytest.fixture(scope="session")
def random_engine(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX Runtime engine folder of ``random_checkpoint``; built once for all workers.

    Its weights are equal in every worker (same seed), and so is its hash. Do not modify it.
    """
    base = tmp_path_factory.getbasetemp()
    # xdist gives each worker a folder below one that they share
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "random-engine"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            build(load_components(random_checkpoint), shared, Target(backend="onnxruntime"))
    return shared


@pytest.fixture
def exported(random_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of ``random_components`` in float32 take the ONNX of ``random_engine``.

    All but the export itself is done: an export takes most of a build's time, and is the same for
    all backends that take ONNX in this precision and of any batch.
    """

    def read(spec: IOSpec, _: nn.Module, path: Path, weights: WeightsFile, **__: object) -> None:
        weights.save(ir.load(random_engine / path.name), path)

    monkeypatch.setattr("hcma_fast.export.compile.export_onnx", read)
