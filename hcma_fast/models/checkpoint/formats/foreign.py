"""Files that hold another kind of model: refused by its name, with what can be done."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hcma_fast.errors import Remedy, WeightsError
from hcma_fast.models.checkpoint.configs import CONTEXT_WIDTHS, foreign_error
from hcma_fast.models.checkpoint.formats.names import is_grounding
from hcma_fast.models.checkpoint.formats.tensor_file import Shape, TensorFile

_BASE = "Use a checkpoint of Stable Diffusion 1.x, or a model made from it."
_CONTEXT = re.compile(r"\.attn2\.to_k\.weight$")
#: a kind of model, and a pattern that a key of such a file has and none of SD 1.x; the first wins
_MODELS: tuple[tuple[str, str], ...] = (
    ("a ControlNet", r"^control_model\.|zero_convs\.|controlnet_cond_embedding|controlnet_down_"),
    (
        "a video model",
        r"motion_modules|time_stack|time_mixer|temporal|^patch_embedding\.weight$|\.time_embedder\.",
    ),
    ("Stable Diffusion XL", r"^conditioner\.embedders\.|label_emb\.0\.0\.weight|add_embedding\."),
    ("Stable Diffusion 2.x", r"^cond_stage_model\.model\."),
    ("Stable Diffusion 3", r"joint_blocks\.|^transformer_blocks\.\d+\.norm1_context\."),
    ("FLUX", r"double_blocks\.|single_transformer_blocks\."),
    ("an IP-Adapter", r"^(image_proj|ip_adapter)\."),
    ("GLIGEN for text and images", r"position_net\.(linears_text|linears_image|null_text_feature)"),
)
_ADDONS: tuple[tuple[str, str], ...] = (
    (
        "a LoRA",
        r"lora_(up|down|A|B)\b|\.lora\.(up|down)\.|_lora\.(up|down)\.|hada_w1_a|lokr_w1|dora_scale",
    ),
    ("a textual inversion", r"^(emb_params|string_to_param\..*|clip_[lg])$"),
)
_MARKS = {
    "v_pred": "predicts v instead of the noise",
    "ztsnr": "was trained with zero terminal signal-to-noise ratio",
}


def refuse_foreign(file: TensorFile) -> None:
    """Refuse a file of another kind of model than SD 1.x and GLIGEN's.

    Raises:
        WeightsError: names the kind.
    """
    name = foreign_model(file.shapes)
    if name is not None:
        raise foreign_error(name, file.path)
    for addon, pattern in _ADDONS:
        if any(re.search(pattern, key) for key in file.shapes):
            raise WeightsError(
                f"this file is {addon}, which is not a model by itself",
                value=str(file.path),
                remedy=_BASE,
            )
    for mark, meaning in _MARKS.items():
        if mark in file.shapes:
            raise WeightsError(
                f"this model {meaning} (its file has the mark {mark!r}), and hcma-fast samples "
                "models that predict the noise",
                value=str(file.path),
                remedy=_BASE,
            )


def foreign_model(shapes: Mapping[str, Shape]) -> str | None:
    """The kind of model that a file is of, where it is none of SD 1.x's."""
    for name, pattern in _MODELS:
        if any(re.search(pattern, key) for key in shapes):
            return name
    if any(len(shape) > 4 for shape in shapes.values()):
        return "a video model"
    widths = {shape[1] for key, shape in shapes.items() if _CONTEXT.search(key) and len(shape) == 2}
    return next((CONTEXT_WIDTHS[width] for width in widths if width in CONTEXT_WIDTHS), None)


def refuse_part(file: TensorFile) -> WeightsError:
    """The error for a file that is a part of a model of ours, and not a whole one."""
    keys = list(file.shapes)
    if keys and all(is_grounding(key) for key in keys):
        kind = "GLIGEN's layers alone"
        remedy = Remedy(
            python="Give the base model, and this file as gligen=.",
            command="Give the base model with --model, and this file with --gligen.",
        )
    elif any(key.startswith(("encoder.", "decoder.", "first_stage_model.")) for key in keys):
        kind = "a VAE alone"
        remedy = Remedy(
            python="Give the base model, and this file as vae=.",
            command="Give the base model with --model, and this file with --vae.",
        )
    elif any(key.startswith(("down_blocks.", "input_blocks.")) for key in keys):
        kind = "a UNet alone"
        remedy = Remedy("Give the whole checkpoint: a single file, or the folder it came from.")
    else:
        kind = f"no model that is known here: {len(keys)} tensors, {sorted(keys)[:1]} first"
        remedy = Remedy(_BASE)
    return WeightsError(f"this file is {kind}", value=str(file.path), remedy=remedy)
