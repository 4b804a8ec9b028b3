"""Our own ONNX form of what torch's exporter writes worse, and the clean-up of its graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir.passes.common as passes
import torch
from onnxscript import ir
from onnxscript.onnx_opset import opset23 as op
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.rules import common as rules


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


#: Of the sixty rules of torch.onnx.export(optimize=True) those that apply to any of our graphs, and
#: their kin. It tries each one at every node, twice: a third of an export's time.
_RULES = [
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.div_by_1_rule,
    rules.sub_0_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.max_min_rule,
    rules.min_max_rule,
]


def simplified(model: ir.Model) -> ir.Model:
    """``model`` folded and without doubles, as onnxscript's optimizer, and with the forms above."""
    passes.InlinePass()(model)
    for _ in range(2):  # what a rule leaves behind can be constant
        fold_constants_ir(model, onnx_shape_inference=True)
        rewrite(model, _RULES)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
    return rewrite(model, [_AttentionOnTokens.rule()])
