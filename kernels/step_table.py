"""Rows of a device table by a device step counter, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_at(table: Tensor, step: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The row of each image, without a wait for the device.

    Args:
        table: (T, K, ...); step: (S,) of integers. T and S are 1, or the batch for settings or
        counters per image.

    Returns:
        rows (B, ...), and (B,) bool: whether the step is in the table. Outside it the row is the
        nearest, for the caller to ignore.
    """
    count = table.shape[1]
    at = step.long().clamp(0, count - 1).expand(batch)
    images = torch.arange(batch, device=table.device)
    inside = (step >= 0) & (step < count)
    return table.expand(batch, *table.shape[1:])[images, at], inside.expand(batch)


def strides(table: Tensor, step: Tensor, batch: int) -> dict[str, int]:
    """By how much the table's pointer and the counter's move from image to image: 0 if shared."""
    return {
        "table_stride": table[0].numel() if len(table) == batch else 0,
        "step_stride": 1 if len(step) == batch else 0,
    }
