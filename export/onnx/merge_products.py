"""Matrix products of a traced graph without the views that make them two-dimensional.

Autograd's trace writes a linear layer on (B, T, C) as view, addmm on (B T, C), view, and attention
on (B, H, T, D) as views around bmm. Every view is a node that a backend must schedule, and hides
from it that a transpose and a product belong together. In the aligner it is one node in five.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import statically_known_true

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)


def unflatten_products(traced: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``mm``, ``addmm`` and ``bmm`` of views as products of what they view; exact.

    Args:
        traced: by ``make_fx``, whose nodes know their shapes (``meta["val"]``).
    """
    for node in list(traced.graph.nodes):
        if node.target == _aten.mm.default:
            _unflatten(node, *node.args)
        elif node.target == _aten.addmm.default:
            bias, left, right = node.args
            _unflatten(node, left, right, bias)
        elif node.target == _aten.bmm.default:
            _unflatten(node, *node.args)
        elif node.target == _aten.transpose.int:
            _transpose_before_view(node)
        elif node.target in _VIEWS:
            _merge_views(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _unflatten(node: Any, left: Any, right: Any, bias: Any = None) -> None:
    """``product(view(x), view(y))`` -> ``view(x @ y)``; for two dimensions, y is a weight."""
    kept = left.meta["val"].ndim - 1
    pair = [_viewed(left, kept), right if kept == 1 else _viewed(right, kept)]
    if pair[0] is left or (kept == 2 and not _same(_shape(pair[0])[:-2], _shape(pair[1])[:-2])):
        return
    with node.graph.inserting_before(node):
        product = _call(node.graph, _aten.matmul.default, *pair)
        if bias is not None:
            product = _call(node.graph, _aten.add.Tensor, product, bias)
        flat = _call(node.graph, _aten.view.default, product, _flat_sizes(left, node))
    node.replace_all_uses_with(flat)


def _transpose_before_view(node: Any) -> None:
    """``transpose(view(x))`` of the last two dimensions -> ``view(transpose(x))``."""
    operand = node.args[0]
    source = _viewed(operand, 2)
    rank = node.meta["val"].ndim
    if source is operand or {axis % rank for axis in node.args[1:]} != {rank - 2, rank - 1}:
        return
    with node.graph.inserting_before(node):
        swapped = _call(node.graph, _aten.transpose.int, source, -2, -1)
        flat = _call(node.graph, _aten.reshape.default, swapped, _flat_sizes(operand, node))
    node.replace_all_uses_with(flat)


def _merge_views(node: Any) -> None:
    """``view(view(x))`` -> ``x``, where the second undoes the first."""
    operand = node.args[0]
    if operand.target in _VIEWS and _same(_shape(operand.args[0]), _shape(node)):
        node.replace_all_uses_with(operand.args[0])


def _viewed(node: Any, kept: int) -> Any:
    """What ``node`` is a view of, if it only merges dimensions before the last ``kept``."""
    if node.target in _VIEWS:
        source = node.args[0]
        if _same(_shape(source)[-kept:], _shape(node)[-kept:]):
            return source
    return node


def _flat_sizes(view: Any, node: Any) -> list[Any]:
    """The shape of ``node`` as arguments: the first size by that of ``view``, the others static."""
    return [view.args[1][0], *map(int, _shape(node)[1:])]


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    # torch 2.11 knows some operators of symbolic sizes by their Python decomposition alone
    with enable_python_dispatcher():
        node.meta["val"] = target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
    return node


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _same(sizes: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(sizes) == len(others) and all(
        statically_known_true(a == b) for a, b in zip(sizes, others, strict=True)
    )
