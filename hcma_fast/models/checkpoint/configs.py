"""The configs of the parts that we load: the keys that are allowed, and values that we can do.

A library reads more from a config than the shape of a model: where to find code, kernels or
another model. So each config is read here, a key that is not on the lists below is refused, and
the library gets the values of the first list alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.json_files import read_object, shorten

PartName = Literal["unet", "vae", "text_encoder"]
_LARGEST, _LONGEST = 2**20, 16
"""Bounds of a number and of a list: a shape beyond them would fill the memory"""
CONTEXT_WIDTHS = {1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
"""Kinds of model by the width of the text that their UNet reads; 768 is SD 1.x's"""
_VIDEO_CLASSES = ("UNet3D", "MotionModel", "SpatioTemporal")
_DIFFUSERS = {"_class_name", "_diffusers_version", "_name_or_path"}
#: of the moving average that some trainers keep
_EMA = {
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step"),
    "use_ema_warmup",
}
#: what transformers writes into any config: output of text, which CLIP's encoder does not do
_GENERATION = {
    *("bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id"),
    *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_attentions", "output_hidden_states", "output_scores", "pad_token_id"),
    *("remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p", "use_cache"),
    *("transformers_version", "_from_model_config"),
}
TRANSFORMERS_KEYS = {
    *("_name_or_path", "add_cross_attention", "architectures", "chunk_size_feed_forward"),
    *("cross_attention_hidden_size", "dropout", "dtype", "finetuning_task", "id2label"),
    *("is_decoder", "is_encoder_decoder", "label2id", "model_type", "prefix", "problem_type"),
    *("pruned_heads", "return_dict", "sep_token_id", "task_specific_params", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "torch_dtype"),
    *("torchscript", "use_bfloat16"),
    *_GENERATION,
}
_UNET = {
    *("act_fn", "addition_embed_type", "addition_embed_type_num_heads"),
    *("addition_time_embed_dim", "attention_head_dim", "attention_type", "block_out_channels"),
    *("center_input_sample", "class_embed_type", "class_embeddings_concat", "conv_in_kernel"),
    *("conv_out_kernel", "cross_attention_dim", "cross_attention_norm", "down_block_types"),
    *("downsample_padding", "dropout", "dual_cross_attention", "encoder_hid_dim"),
    *("encoder_hid_dim_type", "flip_sin_to_cos", "freq_shift", "in_channels"),
    *("layers_per_block", "mid_block_only_cross_attention", "mid_block_scale_factor"),
    *("mid_block_type", "norm_eps", "norm_num_groups", "num_attention_heads"),
    *("num_class_embeds", "only_cross_attention", "out_channels"),
    *("projection_class_embeddings_input_dim", "resnet_out_scale_factor"),
    *("resnet_skip_time_act", "resnet_time_scale_shift"),
    *("reverse_transformer_layers_per_block", "sample_size", "time_cond_proj_dim"),
    *("time_embedding_act_fn", "time_embedding_dim", "time_embedding_type"),
    *("timestep_post_act", "transformer_layers_per_block", "up_block_types"),
    *("upcast_attention", "use_linear_projection"),
}
_VAE = {
    *("act_fn", "block_out_channels", "down_block_types", "force_upcast", "in_channels"),
    *("latent_channels", "latents_mean", "latents_std", "layers_per_block"),
    *("mid_block_add_attention", "norm_num_groups", "out_channels", "sample_size"),
    *("scaling_factor", "shift_factor", "up_block_types", "use_post_quant_conv"),
    "use_quant_conv",
}
_TEXT = {
    *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size"),
    *("initializer_factor", "initializer_range", "intermediate_size", "layer_norm_eps"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "pad_token_id"),
    *("projection_dim", "vocab_size"),
}
_GATED_KEYS = ("use_gated_attention", "enable_gligen")
"""Older names of attention_type="gated\""""
_SPECIAL_TOKENS = {"bos_token", "eos_token", "pad_token", "unk_token"}
_OTHER_TOKENS = {
    *("additional_special_tokens", "cls_token", "extra_special_tokens", "mask_token", "sep_token")
}
_TOKENIZER = {
    *("add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "backend"),
    *("clean_up_tokenization_spaces", "do_lower_case", "errors", "is_local"),
    *("local_files_only", "max_length", "model_max_length", "name_or_path", "padding_side"),
    *("special_tokens_map_file", "stride", "tokenizer_class", "truncation_side"),
    *("truncation_strategy", "use_fast"),
    *_SPECIAL_TOKENS,
    *_OTHER_TOKENS,
}


@dataclass(frozen=True)
class PartKind:
    """What is known of one part's config.json."""

    classes: tuple[str, ...]
    """names in the config that stand for the class that we load; the first is its own"""
    used: Set[str]
    """keys that the library gets"""
    ignored: Set[str]
    """keys that describe nothing that we do"""
    unset: tuple[str, ...] = ()
    """keys whose value must be null or 0: we do not do what they ask for"""
    layers: tuple[str, ...] = ("layers_per_block", "transformer_layers_per_block")
    """keys that say how often something is repeated"""
    most_layers: int = 16


PART_KINDS: dict[PartName, PartKind] = {
    "unet": PartKind(
        ("UNet2DConditionModel",),
        _UNET,
        {*_DIFFUSERS, *_EMA, *_GATED_KEYS},
        unset=(
            *("addition_embed_type", "class_embed_type", "encoder_hid_dim"),
            *("encoder_hid_dim_type", "num_class_embeds", "time_cond_proj_dim"),
        ),
    ),
    "vae": PartKind(
        ("AutoencoderKL",),
        _VAE,
        {*_DIFFUSERS, *_EMA},
        unset=("latents_mean", "latents_std", "shift_factor"),
    ),
    "text_encoder": PartKind(
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        _TEXT,
        TRANSFORMERS_KEYS - _TEXT,
        layers=("num_hidden_layers",),
        most_layers=128,
    ),
}
TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
#: keys of the JSON files beside a part's config.json, by the files' names
OTHER_CONFIGS: dict[str, Set[str]] = {
    "generation_config.json": _GENERATION,
    "tokenizer_config.json": _TOKENIZER,
    "special_tokens_map.json": {*_SPECIAL_TOKENS, *_OTHER_TOKENS},
    "tokenizer.json": {
        *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"),
        *("post_processor", "decoder", "model"),
    },
}


def read_config(part: PartName, path: Path) -> dict[str, Any]:
    """What a part's class is made with, from its config.json.

    Raises:
        WeightsError: it is missing or damaged, has a key that is not allowed or a value that we
            cannot do, or is of another class.
    """
    kind, config = PART_KINDS[part], read_object(path)
    if part == "unet" and (name := _foreign_unet(config)) is not None:
        raise foreign_error(name, path)
    check_class(path, part, _class_of(config), kind.classes)
    check_keys(path, config, kind.used | kind.ignored)
    used = {key: value for key, value in config.items() if key in kind.used}
    _check_sizes(path, kind, used)
    for key in kind.unset:
        if used.get(key) not in (None, 0):
            raise refused_value(path, f"hcma-fast does not do {key}", used[key])
    if part == "unet":
        _name_attention(path, config, used)
    return used


def _foreign_unet(config: dict[str, Any]) -> str | None:
    """The kind of model that a UNet's config is of, where it is none of SD 1.x's."""
    if any(word in str(config.get("_class_name")) for word in _VIDEO_CLASSES):
        return "a video model"
    width = config.get("cross_attention_dim")
    if config.get("addition_embed_type") == "text_time":
        return CONTEXT_WIDTHS[2048]
    return CONTEXT_WIDTHS.get(width) if isinstance(width, int) else None


def foreign_error(name: str, path: Path) -> WeightsError:
    """The error for another kind of model."""
    return WeightsError(
        f"this is {name}, and hcma-fast loads Stable Diffusion 1.x with GLIGEN's layers",
        value=str(path),
        remedy="Use a checkpoint of Stable Diffusion 1.x, or a model made from it.",
    )


def _check_sizes(path: Path, kind: PartKind, used: dict[str, Any]) -> None:
    for key, value in used.items():
        largest = kind.most_layers if key in kind.layers else _LARGEST
        for leaf in _leaves(value):
            if isinstance(leaf, int) and abs(leaf) > largest:
                raise refused_value(path, f"{key} is above {largest}", leaf)
        if isinstance(value, list) and len(value) > _LONGEST:
            raise refused_value(path, f"{key} has over {_LONGEST} entries", len(value))
    size, scale = used.get("sample_size", 1), used.get("scaling_factor", 1)
    if size is not None and (type(size) is not int or size < 1):
        raise refused_value(path, "sample_size must be a positive whole number", size)
    if type(scale) not in (int, float) or scale <= 0:
        raise refused_value(path, "scaling_factor must be a positive number", scale)


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def check_keys(path: Path, config: dict[str, Any], allowed: Set[str]) -> None:
    """Refuse a key that is not on the list.

    Raises:
        WeightsError: names the key.
    """
    for key in config:
        if key not in allowed:
            raise refused_code(path, f"the key {shorten(key)!r}")


def check_class(path: Path, part: str, name: object, known: tuple[str, ...]) -> None:
    """Refuse a part of a class that we do not load.

    Raises:
        WeightsError: names both classes.
    """
    if name is not None and name not in known:
        raise WeightsError(
            f"the {part} is of the class {shorten(name)}, and hcma-fast loads {known[0]} only",
            value=str(path),
            remedy=f"Use a checkpoint whose {part} is a {known[0]}.",
        )


def refused_code(path: Path, what: str) -> WeightsError:
    """The error for what could make a library run a stranger's code."""
    return WeightsError(
        f"{what} is not allowed here: it could ask a library to run code of its own",
        value=str(path),
        remedy="Use a checkpoint of the libraries' own classes, or remove the key if you know "
        "that the model does not need it.",
    )


def _class_of(config: dict[str, Any]) -> object:
    """The class that a config names; None when it names none."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    return config.get("_class_name", name)


def _name_attention(path: Path, config: dict[str, Any], used: dict[str, Any]) -> None:
    """Older GLIGEN configs have a switch where today's have ``attention_type``."""
    switches = [config.get(key) for key in _GATED_KEYS]
    if any(switch not in (None, True, False) for switch in switches):
        raise refused_value(path, f"{' and '.join(_GATED_KEYS)} must be true or false", switches)
    if True in switches and used.setdefault("attention_type", "gated") == "default":
        raise refused_value(path, "it says both that attention is gated and that it is not", None)


def refused_value(path: Path, what: str, value: object) -> WeightsError:
    """The error for a value that we cannot do."""
    shown = str(path) if value is None else f"{shorten(value)} in {path}"
    return WeightsError(
        f"this config cannot be used: {what}",
        value=shown,
        remedy="Use a checkpoint of Stable Diffusion 1.x with GLIGEN's layers.",
    )
