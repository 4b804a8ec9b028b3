"""Operations and bytes of one call of a graph, counted from the graph itself; nothing is computed.

Torch modules run on the meta device, which knows shapes and dtypes only. Operations are counted by
the formulas of ``torch.utils.flop_counter``: matrix products, convolutions and attention, a
multiply and an add as two. What pointwise operators compute is left out, as the field does; the
exponentials of softmax, the padding of attention and what norms pass over are counted beside.
``FlopCounterMode`` itself cannot see inside a module that calls ``autograd.grad``, as `align` does;
the tests compare it with these counts elsewhere, and on the traced gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hcma_fast.specs import BATCH, IOSpec

_aten = torch.ops.aten
#: allocate or rename memory, but read and write none; views say so themselves
_NO_TRAFFIC = frozenset(
    (_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty)
)
#: read some rows of their first argument, as many bytes as they write
_GATHERS = frozenset((_aten.embedding, _aten.index, _aten.index_select, _aten.gather))


_NORMS = frozenset(
    (
        *(_aten.native_group_norm, _aten.native_layer_norm),
        *(_aten.native_group_norm_backward, _aten.native_layer_norm_backward),
    )
)
_SOFTMAX = frozenset((_aten._softmax, _aten._safe_softmax))
#: widths of a head for which attention kernels are written; others are filled up with zeros
_HEAD_WIDTHS = (16, 32, 64, 96, 128, 192, 256)


def padded_width(width: int) -> int:
    """The width of a head that a fused attention kernel computes with."""
    return next((size for size in _HEAD_WIDTHS if size >= width), width)


@dataclass(frozen=True)
class Operation:
    """One operator that runs: what it computes, in which dtype, and what it reads and writes."""

    flops: int
    dtype: str
    bytes: int
    padding_flops: int = 0
    """products with the zeros that fill up attention's heads"""
    exponentials: int = 0
    normalised: int = 0
    """values that a norm reads, and writes as many"""


@dataclass(frozen=True)
class Counts:
    """One call of a graph."""

    operations: tuple[Operation, ...]
    weights_bytes: int
    """each weight that is used, once; of embedding tables nothing"""
    io_bytes: int
    """inputs and outputs of the graph, once"""

    @property
    def flops(self) -> int:
        """Of all operations."""
        return sum(operation.flops for operation in self.operations)

    @property
    def padding_flops(self) -> int:
        """Of attention's heads, see :class:`Operation`."""
        return sum(operation.padding_flops for operation in self.operations)

    @property
    def exponentials(self) -> int:
        """Of all softmaxes."""
        return sum(operation.exponentials for operation in self.operations)

    @property
    def normalised(self) -> int:
        """Values that norms read."""
        return sum(operation.normalised for operation in self.operations)

    @property
    def compulsory_bytes(self) -> int:
        """The least that must pass through the memory, however well the graph is fused."""
        return self.weights_bytes + self.io_bytes

    @property
    def unfused_bytes(self) -> int:
        """When every operator reads its operands from memory and writes its result there."""
        return sum(operation.bytes for operation in self.operations)


def count_module(module: nn.Module, spec: IOSpec, batch: int) -> Counts:
    """One call of a graph's module (``ModelSource.graph``, ``export.precision.at_precision``).

    Attention counts as one operator, as fused kernels have it; in `align`, which is exported with
    its backward, it is the products and the softmax that the exported graph has.
    """
    module = module if _on_meta(module) else copy.deepcopy(module).to("meta")
    inputs = [
        torch.empty(_sizes(t.shape, batch), dtype=getattr(torch, t.dtype), device="meta")
        for t in spec.inputs
    ]
    counter = _Counter([*module.parameters(), *module.buffers()])
    fused = spec.graph != "align"
    with (
        torch.no_grad(),
        counter,
        _WholeAttention(counter) if fused else sdpa_kernel(SDPBackend.MATH),
    ):
        outputs = module(*inputs)
    return Counts(
        operations=tuple(counter.operations),
        weights_bytes=sum(counter.weights_read.values()),
        io_bytes=sum(tensor.nbytes for tensor in (*inputs, *outputs)),
    )


def _sizes(shape: Iterable[int | str], batch: int) -> list[int]:
    return [batch if size == BATCH else int(size) for size in shape]


def _on_meta(module: nn.Module) -> bool:
    return all(t.is_meta for t in (*module.parameters(), *module.buffers()))


class _Counter(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.weights_read: dict[int, int] = {}
        # parameters that are parts of one storage, as those of a split layer, are one
        self._weights = {_storage(weight): weight.untyped_storage().nbytes() for weight in weights}
        self._within: int | None = None
        """flops so far of the operator that this one is a part of"""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        computed = 0 if formula is None else formula(*args, **kwargs, out_val=result)
        if self._within is not None:
            self._within += computed
        elif not func.is_view and func.overloadpacket not in _NO_TRAFFIC:
            read, written = _tensors((args, kwargs)), _tensors(result)
            if func.overloadpacket in _GATHERS:
                read = read[1:] + written
            exponentials = result.numel() if func.overloadpacket in _SOFTMAX else 0
            normalised = written[0].numel() if func.overloadpacket in _NORMS else 0
            self._add(computed, read, written, exponentials=exponentials, normalised=normalised)
        return result

    def attention(self, call: Callable[[], Tensor], read: list[Tensor]) -> Tensor:
        """What ``call`` does is one operator, of query, key, value (in ``read``) and its result."""
        self._within = 0
        query, key = read[:2]
        width = query.shape[-1]
        try:
            result = call()
            self._add(
                self._within,
                read,
                [result],
                padding_flops=self._within * padded_width(width) // width - self._within,
                exponentials=query.numel() // width * key.shape[-2],
            )
        finally:
            self._within = None
        return result

    def _add(self, flops: int, read: list[Tensor], written: list[Tensor], **besides: int) -> None:
        for tensor in read:
            key = _storage(tensor)
            if key in self._weights:
                self.weights_read[key] = self._weights[key]
        dtype = next((t.dtype for t in (*written, *read) if t.is_floating_point()), torch.int64)
        moved = sum(map(_held, read)) + sum(map(_held, written))
        name = str(dtype).removeprefix("torch.")
        self.operations.append(Operation(flops, name, moved, **besides))


class _WholeAttention(TorchFunctionMode):
    """Attention is one operator: its scores never reach the memory."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return call()
        return self._counter.attention(call, _tensors((args, kwargs)))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    # tensors of the meta device have no address
    return int(tensor.untyped_storage()._cdata)


def _held(tensor: Tensor) -> int:
    """Bytes that lie in memory: an expanded tensor repeats them."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())
