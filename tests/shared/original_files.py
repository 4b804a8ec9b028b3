"""Weights in the names of the original programs, made from diffusers' models: for tests.

The names are written down here from the original modules (Stable Diffusion's ``openaimodel.py`` and
``model.py``, GLIGEN's ``grounding_net``), and not taken from the converters that are tested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from hcma_fast.config import AlignerConfig
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import Components

WIDTH, LATENT, LEVELS, LAYERS = 64, 8, 4, 2
_RESNET = (
    *(("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1")),
    *(("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")),
)
_UNET = (
    ("conv_in.", "input_blocks.0.0."),
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
)
_VAE_ATTENTION = (
    *(("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")),
    ("to_out.0", "proj_out"),
)


def make_parts(*, gated: bool, width: int = WIDTH) -> dict[str, torch.nn.Module]:
    """The parts of a small model of SD 1.x's kind: its heads, groups and vocabulary."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        # as SD 1.x's config.json has them
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    cross = "CrossAttnDownBlock2D"
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=LAYERS,
        down_block_types=(cross, cross, cross, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=width,
        attention_head_dim=8,
        attention_type="gated" if gated else "default",
    )
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if "alpha_" in name:
                value.fill_(0.5)  # gates start at 0, which would hide the layers behind them
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=LAYERS,
        latent_channels=4,
        sample_size=LATENT * 8,
    )
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}


def make_aligner(width: int = WIDTH) -> Aligner:
    """An aligner for them."""
    torch.manual_seed(1)
    shape = {"latent_size": LATENT, "patch_size": 2, "token_width": 16, "width": 32, "depth": 2}
    return Aligner(AlignerConfig(**shape, heads=2, text_width=width))


def unet_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet in the names of ``openaimodel.py``, without a prefix."""
    return {_unet_name(name, state): value for name, value in state.items()}


def _unet_name(name: str, state: Mapping[str, Tensor]) -> str:
    def resnet(rest: str) -> str:
        for ours, theirs in _RESNET:
            rest = rest.replace(ours, theirs)
        return rest

    for ours, theirs in _UNET:
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            return theirs + (resnet(rest) if "resnets" in ours else rest)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match is None:
        return name  # the position net's
    way, block, kind, layer, rest = match.groups()
    i, j = int(block), int(layer)
    number = 1 + 3 * i + j if way == "down" else 3 * i + j
    place = f"{'input' if way == 'down' else 'output'}_blocks"
    if kind == "resnets":
        return f"{place}.{number}.0.{resnet(rest)}"
    if kind == "attentions":
        return f"{place}.{number}.1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    behind = 2 if any(key.startswith(f"up_blocks.{i}.attentions") for key in state) else 1
    return f"output_blocks.{3 * i + 2}.{behind}.{rest}"


def vae_state(state: Mapping[str, Tensor], levels: int = LEVELS) -> dict[str, Tensor]:
    """A VAE in the names of ``model.py``, without a prefix."""
    found = {}
    for name, value in state.items():
        key = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        for kind, new in (("resnets", "block"), ("upsamplers.0", "upsample")):
            key = re.sub(
                rf"up_blocks\.(\d)\.{kind}",
                lambda m, n=new: f"up.{levels - 1 - int(m[1])}.{n}",
                key,
            )
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        if "mid_block.attentions.0." in key:
            key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
            for ours, theirs in _VAE_ATTENTION:
                key = key.replace(f".{ours}.", f".{theirs}.")
        product = "mid.attn_1" in key and value.dim() == 2
        found[key] = value[:, :, None, None] if product else value
    return found


def text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder as ``FrozenCLIPEmbedder`` holds it, without a prefix."""
    names = {f"text_model.{n.removeprefix('text_model.')}": value for n, value in state.items()}
    return names | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def states(parts: Mapping[str, torch.nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Of each part, in the original names without a prefix."""
    return {
        "unet": unet_state(parts["unet"].state_dict()),
        "vae": vae_state(parts["vae"].state_dict()),
        "text_encoder": text_state(parts["text_encoder"].state_dict()),
    }


def single_file(parts: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """As ``sd-v1-4.ckpt`` and what web interfaces save: with the noise schedule's buffers."""
    of = states(parts)
    prefixes = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    }
    found = {prefixes[part] + key: value for part in of for key, value in of[part].items()}
    buffers = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "logvar")
    return found | {name: torch.rand(1000) for name in buffers}


def grounding_layers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As in ComfyUI's ``gligen_sd14_textbox_pruned.safetensors``."""
    return {k: v for k, v in state.items() if ".fuser." in k or k.startswith("position_net.")}


def gligen_checkpoint(parts: Mapping[str, torch.nn.Module]) -> dict[str, object]:
    """As GLIGEN's training saves it: five dicts."""
    of = states(parts)
    return {
        "model": of["unet"],
        "autoencoder": of["vae"],
        "text_encoder": {f"transformer.{key}": value for key, value in of["text_encoder"].items()},
        "diffusion": {"betas": torch.rand(1000), "sqrt_alphas_cumprod": torch.rand(1000)},
        "config_dict": {"_content": {"lr": 5e-05, "name": "gligen"}},
    }


@torch.no_grad()
def drawn(parts: Components) -> dict[str, Tensor]:
    """Prediction of the UNet, embeddings and image of a model, for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    specs = parts.specs(LATENT * 8, LATENT * 8)
    hidden, pooled = parts.graph("text_encoder")(
        torch.tensor(
            parts.tokenizer(["a dog", "a cat"], padding="max_length", max_length=77).input_ids
        )
    )
    z = torch.randn(1, 4, LATENT, LATENT, generator=generator)
    boxes, labels = torch.zeros(1, 30, 4), torch.zeros(1, 30, pooled.shape[-1])
    mask = torch.zeros(1, 30)
    boxes[0, 0], labels[0, 0], mask[0, 0] = torch.tensor([0.1, 0.2, 0.6, 0.9]), pooled[1], 1
    given = {
        "boxes": boxes,
        "region_mask": mask,
        "label_embeddings": labels,
        "encoder_hidden_states": hidden[:1],
    }
    graph = parts.graph("grounding", LATENT * 8, LATENT * 8)
    contexts = dict(
        zip(
            specs["grounding"].output_names,
            graph(*(given[name] for name in specs["grounding"].input_names)),
            strict=True,
        )
    )
    found = {"hidden": hidden, "pooled": pooled, "image": parts.graph("vae_decoder")(z)[0]}
    inputs = {"sample": z, "timestep": torch.tensor([500]), "grounding_gate": torch.ones(1)}
    for name in ("unet_grounded", "unet_plain"):
        if name in specs:
            wanted = [{**inputs, **contexts}[key] for key in specs[name].input_names]
            found[name] = parts.graph(name)(*wanted)[0]
    return found


def check_equal(ours: Components, expected: Components) -> None:
    """The same predictions and image to 1e-5."""
    one, other = drawn(ours), drawn(expected)
    assert set(one) == set(other)
    for name, value in one.items():
        assert value.abs().max() > 1e-3, name
        assert (value - other[name]).abs().max() < 1e-5, name
