"""GLIGEN's layers from a file of their own, laid over any base of Stable Diffusion 1.x.

ComfyUI's adapter is such a file, and so is a whole GLIGEN checkpoint: of it the ``fuser`` and
``position_net`` tensors are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.formats.foreign import refuse_foreign
from hcma_fast.models.checkpoint.formats.names import is_grounding, unet_names
from hcma_fast.models.checkpoint.formats.tensor_file import TensorFile
from hcma_fast.models.checkpoint.json_files import tell_once
from hcma_fast.models.checkpoint.parts import PartPlan
from hcma_fast.models.checkpoint.weight_files import WeightFile, list_names

_STARTS = ("input_blocks.", "middle_block.", "output_blocks.", "position_net.")
_DIFFUSERS_STARTS = ("down_blocks.", "mid_block.", "up_blocks.")


def with_gligen(base: PartPlan, path: Path) -> PartPlan:
    """The UNet of ``base`` with the grounding layers of the file.

    Raises:
        WeightsError: the file has none, or they cannot be laid over this UNet.
    """
    file = TensorFile.read(path)
    refuse_foreign(file)
    keys = [key for key in file.shapes if is_grounding(key)]
    if not keys:
        raise WeightsError(
            f"there are no GLIGEN layers (fuser, position_net) in this file: "
            f"{list_names(file.shapes)}",
            value=str(path),
            remedy="Give an adapter such as gligen_sd14_textbox_pruned.safetensors, or a GLIGEN "
            "checkpoint.",
        )
    bare = {_bare(key): key for key in keys}
    levels, layers = _depth(base.config, path)
    moved = unet_names(bare, levels, layers)
    names = {key: moved.get(name, name) for name, key in bare.items()}
    if rest := len(file.shapes) - len(keys):
        tell_once(f"note: of {path.name} the GLIGEN layers are used, not its {rest} other tensors")
    plain = tuple(_without_grounding(weights) for weights in base.weights)
    config = {**base.config, "attention_type": "gated"}
    return PartPlan(config, (*plain, WeightFile(path, names)))


def _bare(key: str) -> str:
    """The key from where the UNet's own names begin, whatever program wrote a prefix."""
    starts = [key.find(start) for start in (*_STARTS, *_DIFFUSERS_STARTS)]
    return key[min((at for at in starts if at >= 0), default=0) :]


def _without_grounding(weights: WeightFile) -> WeightFile:
    names = weights.names
    if names is None:
        names = {key: key for key in TensorFile.read(weights.path).shapes}
    return WeightFile(
        weights.path, {k: name for k, name in names.items() if not is_grounding(name)}
    )


def _depth(config: Mapping[str, Any], path: Path) -> tuple[int, int]:
    layers, levels = config.get("layers_per_block", 2), len(config["block_out_channels"])
    if not isinstance(layers, int):
        raise WeightsError(
            "GLIGEN's layers cannot be laid over a UNet whose depth differs by resolution",
            value=str(path),
            remedy="Use a base of Stable Diffusion 1.x.",
        )
    return levels, layers
