"""Batches cut into parts and put together again, for engines that compute parts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hcma_fast.specs import BATCH, IOSpec


def rows_of(inputs: Mapping[str, Tensor], spec: IOSpec) -> int:
    """The batch of ``inputs``."""
    return len(inputs[next(tensor.name for tensor in spec.inputs if BATCH in tensor.shape)])


def cut(
    inputs: Mapping[str, Tensor], spec: IOSpec, sizes: Sequence[int]
) -> list[dict[str, Tensor]]:
    """Views of ``sizes[k]`` rows each, one after the other; what has no batch goes to all parts."""
    parts: list[dict[str, Tensor]] = [{} for _ in sizes]
    for tensor in spec.inputs:
        value = inputs[tensor.name]
        shares = value.split(list(sizes)) if BATCH in tensor.shape else [value] * len(parts)
        for part, share in zip(parts, shares, strict=True):
            part[tensor.name] = share
    return parts


def join(found: Sequence[Mapping[str, Tensor]], spec: IOSpec) -> dict[str, Tensor]:
    """The opposite of :func:`cut` for outputs, in memory of their own; parts agree on the rest."""
    return {
        tensor.name: torch.cat([part[tensor.name] for part in found])
        if BATCH in tensor.shape
        else found[0][tensor.name].clone()
        for tensor in spec.outputs
    }
