"""Our own ONNX form of a torch operator for which torch's exporter chooses a worse one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import ir
from onnxscript.onnx_opset import opset23 as op
from onnxscript.rewriter import pattern, rewrite


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


class _AttentionOnTokens(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Attention on (B, T, H D) as it comes from a linear layer, with the number of heads.

    torch's operator wants (B, H, T, D), so every query, key, value and result is reshaped and
    transposed around it. ONNX's takes either. On ONNX Runtime's CPU that is 5% of a UNet call.
    """

    def pattern(
        self, op: Any, query: Any, key: Any, value: Any, at_q: Any, at_k: Any, at_v: Any, back: Any
    ) -> Any:
        heads = op.Transpose(op.Reshape(query, at_q), perm=[0, 2, 1, 3], _outputs=["heads"])
        attended = op.Attention(
            heads,
            op.Transpose(op.Reshape(key, at_k), perm=[0, 2, 1, 3]),
            op.Transpose(op.Reshape(value, at_v), perm=[0, 2, 1, 3]),
            _allow_other_attributes=True,
            _outputs=["attended"],
        )
        return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), back)

    def rewrite(
        self, op: Any, query: Any, key: Any, value: Any, heads: Any, attended: Any, **_: Any
    ) -> Any:
        count = int(heads.shape[1])
        kept = attended.producer().attributes
        return op.Attention(query, key, value, **kept, q_num_heads=count, kv_num_heads=count)


def rewritten(model: ir.Model) -> ir.Model:
    """``model`` with the forms above that need more than one operator to be seen."""
    return rewrite(model, [_AttentionOnTokens.rule()])
