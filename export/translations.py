"""Our own ONNX form of a torch operator for which torch's exporter chooses a worse one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript.onnx_opset import opset23 as op


def _group_norm(
    input: Any,
    num_groups: int,
    weight: Any,
    bias: Any,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """By InstanceNormalization over the groups.

    ONNX Runtime has no kernel for GroupNormalization: it takes it apart into 25 small nodes (a
    third of the time of a UNet call on a CPU). Shapes are static but for the batch.
    """
    groups = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
    one, zero = ([value] * num_groups for value in (1.0, 0.0))
    normed = op.InstanceNormalization(
        groups, op.Constant(value_floats=one), op.Constant(value_floats=zero), epsilon=eps
    )
    back = op.Reshape(normed, op.Constant(value_ints=[0, *map(int, input.shape[1:])]))
    axes = op.Constant(value_ints=list(range(1, len(input.shape) - 1)))
    return op.Add(op.Mul(back, op.Unsqueeze(weight, axes)), op.Unsqueeze(bias, axes))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: _group_norm,
}
"""For ``torch.onnx.export(custom_translation_table=...)``."""
