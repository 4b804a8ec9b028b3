"""Names of weights: those of the original Stable Diffusion code (LDM) as diffusers' names.

diffusers' own converters move the values of a dict from one name to another. They are given keys
as values, so what they return is the table of names, and no weight is read for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

_UNET_PREFIX = "model.diffusion_model."
_LDM_UNET = re.compile(r"(input_blocks|middle_block|output_blocks)\.\d+\.")
_LDM_VAE = re.compile(r"(encoder|decoder)\.(down|mid|up)\.")
_POSITION_NET = "position_net."
_MIDDLE_BLOCKS = 3
_NO_BLOCK = "none"


class _Key(str):
    """A key in the place of its tensor: the VAE's converter looks at the tensor's shape."""

    __slots__ = ()
    shape = ()
    ndim = 0


def is_grounding(name: str) -> bool:
    """Is it a weight of GLIGEN's layers, in any of the formats?"""
    return ".fuser." in name or _POSITION_NET in name


def unet_names(keys: Iterable[str], levels: int, layers: int) -> dict[str, str]:
    """diffusers' names of a UNet's weights, by their keys, which have no prefix.

    Args:
        keys: in LDM's names or in diffusers', of the whole UNet or of some of its layers.
        levels, layers: how many resolutions the UNet has, and residual blocks in each.
    """
    keys = list(keys)
    if not any(_LDM_UNET.match(key) for key in keys):
        return {key: key for key in keys}
    blocks = levels * (layers + 1)
    counts = {"input_blocks": blocks, "middle_block": _MIDDLE_BLOCKS, "output_blocks": blocks}
    # the converter counts the blocks by the names that are there, and an adapter has only some
    present = [f"{name}.{i}.{_NO_BLOCK}" for name, count in counts.items() for i in range(count)]
    padded = {_UNET_PREFIX + key: key for key in (*present, *keys)}
    moved = convert_ldm_unet_checkpoint(padded, {"layers_per_block": layers})
    # the converter leaves out GLIGEN's position net
    kept = {key: key for key in keys if key.startswith(_POSITION_NET)}
    found = {key: name for name, key in moved.items() if key is not None and key not in present}
    return found | kept


def vae_names(keys: Iterable[str], levels: int) -> dict[str, str]:
    """diffusers' names of a VAE's weights, by their keys, which have no prefix."""
    keys = list(keys)
    if not any(_LDM_VAE.match(key) for key in keys):
        return {key: key for key in keys}
    config = {"down_block_types": [None] * levels, "up_block_types": [None] * levels}
    moved = convert_ldm_vae_checkpoint({key: _Key(key) for key in keys}, config)
    return {str(key): name for name, key in moved.items()}


def with_prefix(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The same names by the keys that a file with this prefix has."""
    return {prefix + key: name for key, name in names.items()}
