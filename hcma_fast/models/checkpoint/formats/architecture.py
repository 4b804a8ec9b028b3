"""The configs of Stable Diffusion 1.x, and what the shapes of a file's weights say of them.

A file of weights has no config. Widths and depths follow from the shapes; what does not (heads,
norm groups, the noise schedule) is that of SD 1.x.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.formats.tensor_file import Shape

_CROSS = "CrossAttn"
#: configs of the parts of masterful/gligen-1-4-generation-text-box; what is not named is default
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*(f"{_CROSS}DownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *(f"{_CROSS}UpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "attention_type": "gated",
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
}
#: of CLIP's vocabulary, see ``tokenizer.clip_tokenizer``
_TEXT_TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
_HEAD_WIDTH = 64
_DOWN = re.compile(r"input_blocks\.\d+\.0\.op\.weight")
_BLOCK = re.compile(r"input_blocks\.(\d+)\.")
_VAE_BLOCK = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_INPUTS = {9: "an inpainting model", 8: "an image editing model (InstructPix2Pix)"}


def unet_levels(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Resolutions of a UNet in LDM's names, and residual blocks in each."""
    levels = 1 + sum(bool(_DOWN.fullmatch(key)) for key in shapes)
    blocks = 1 + max(int(match[1]) for key in shapes if (match := _BLOCK.match(key)))
    if blocks % levels:
        raise ValueError(f"{blocks} input blocks at {levels} resolutions")
    return levels, blocks // levels - 1


def unet_config(shapes: Mapping[str, Shape], path: Path) -> dict[str, Any]:
    """Config of a UNet in LDM's names.

    Raises:
        WeightsError: it is not a UNet of SD 1.x.
    """

    def read() -> dict[str, Any]:
        levels, layers = unet_levels(shapes)
        first = [1 + level * (layers + 1) for level in range(levels)]
        widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
        crosses = [f"input_blocks.{i}.1.proj_in.weight" in shapes for i in first]
        context = [shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")]
        return {
            **UNET,
            "in_channels": shapes["input_blocks.0.0.weight"][1],
            "out_channels": shapes["out.2.weight"][0],
            "block_out_channels": tuple(widths),
            "layers_per_block": layers,
            "down_block_types": tuple(f"{_CROSS * cross}DownBlock2D" for cross in crosses),
            "up_block_types": tuple(f"{_CROSS * cross}UpBlock2D" for cross in reversed(crosses)),
            "cross_attention_dim": context[0][1],
            "attention_type": "gated" if any(".fuser." in key for key in shapes) else "default",
        }

    config = _read("UNet", path, read)
    inputs = config["in_channels"]
    if inputs in _INPUTS:
        raise WeightsError(
            f"this is {_INPUTS[inputs]}: its UNet takes {inputs} channels, and hcma-fast draws "
            "from noise alone, with 4",
            value=str(path),
            remedy="Use the base model of the same family.",
        )
    return config


def vae_config(shapes: Mapping[str, Shape], path: Path) -> dict[str, Any]:
    """Config of a VAE in LDM's names or in diffusers'.

    Raises:
        WeightsError: it is not a VAE of SD 1.x.
    """

    def read() -> dict[str, Any]:
        blocks = [(int(m[1]), int(m[2])) for key in shapes if (m := _VAE_BLOCK.match(key))]
        levels, layers = 1 + max(level for level, _ in blocks), 1 + max(n for _, n in blocks)
        start = "encoder.down" if "encoder.down.0.block.0.conv1.weight" in shapes else ""
        pattern = f"{start}.{{}}.block.0" if start else "encoder.down_blocks.{}.resnets.0"
        widths = [shapes[f"{pattern.format(i)}.conv1.weight"][0] for i in range(levels)]
        return {
            **VAE,
            "block_out_channels": tuple(widths),
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "layers_per_block": layers,
            "latent_channels": shapes["decoder.conv_in.weight"][1],
        }

    return _read("VAE", path, read)


def text_config(shapes: Mapping[str, Shape], path: Path) -> dict[str, Any]:
    """Config of a CLIP text encoder, by transformers' names without ``text_model.``.

    Raises:
        WeightsError: it is not a text encoder of SD 1.x.
    """

    def read() -> dict[str, Any]:
        words, width = shapes["embeddings.token_embedding.weight"]
        if words != TEXT["vocab_size"] or width % _HEAD_WIDTH:
            raise ValueError(f"its table of words is {words} x {width}")
        return {
            **TEXT,
            **_TEXT_TOKENS,
            "hidden_size": width,
            "projection_dim": width,
            "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": 1 + max(int(m[1]) for key in shapes if (m := _LAYER.match(key))),
            "num_attention_heads": width // _HEAD_WIDTH,
            "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        }

    return _read("text encoder", path, read)


def _read(part: str, path: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``read()``; what it cannot find or unpack means another architecture."""
    try:
        return read()
    except (KeyError, IndexError, ValueError) as error:
        seen = f"no weight {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(
            f"the {part} in this file is not that of Stable Diffusion 1.x: {seen}",
            value=str(path),
            remedy="Use a checkpoint of Stable Diffusion 1.x, or a model made from it.",
        ) from error
