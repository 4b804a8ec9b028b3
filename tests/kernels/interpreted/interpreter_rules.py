"""What the cases share, and a pytest plugin: a bfloat16 in Triton's interpreter that is one.

The rule: the error against the float64 reference is at most twice that of plain torch code in the
same precision, plus a floor of two units in the last place of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
import triton
from hypothesis import settings
from torch import Tensor
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "run test_interpreter.py, which sets TRITON_INTERPRET"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXAMPLES = settings(max_examples=8, deadline=None, database=None, derandomize=True)


@pytest.fixture(autouse=True, scope="session")
def _true_bfloat16() -> Iterable[None]:
    """The interpreter keeps bfloat16 as uint16: tl.dot multiplies those, and a cast cuts off."""
    bfloat16, float32 = triton.language.bfloat16, triton.language.float32
    handle, patch = interpreter.TensorHandle, pytest.MonkeyPatch()
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        if a.dtype.scalar == bfloat16:
            a, b = (cast(self, value, float32) for value in (a, b))
        return dot(self, a, b, *rest)

    def cast_impl(self, source, target):  # type: ignore[no-untyped-def]
        if source.dtype.scalar != float32 or target.scalar != bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return handle(rounded.view(torch.uint16).numpy(), bfloat16)

    patch.setattr(builder, "create_dot", create_dot)
    patch.setattr(builder, "cast_impl", cast_impl)
    yield
    patch.undo()


def double(values: Iterable[Tensor]) -> list[Tensor]:
    return [v.double() if v.is_floating_point() else v for v in values]


def check(
    found: Iterable[Tensor],
    same: Iterable[Tensor],
    exact: Iterable[Tensor],
    summands: Iterable[float] | None = None,
) -> None:
    """The rule, output by output; ``same`` is torch in the same precision.

    ``summands`` are the sizes of what an output is the difference of, where that may cancel.
    """
    exact = list(exact)
    sizes = [0.0] * len(exact) if summands is None else summands
    for number, (value, peer, truth, size) in enumerate(
        zip(found, same, exact, sizes, strict=True)
    ):
        assert value.shape == truth.shape
        assert torch.isfinite(value).all()
        floor = 2 * torch.finfo(value.dtype).eps * max(float(truth.abs().max()), size)
        error, allowed = (float((v.double() - truth).abs().max()) for v in (value, peer))
        assert error <= 2 * allowed + floor, f"output {number}: {error} > 2 * {allowed} + {floor}"


def rows_of(kernel: Callable[..., object], inputs: list[Tensor]) -> None:
    """A batch gives what its images give one by one, bit for bit, and the same when run again."""

    def run(values: list[Tensor]) -> tuple[Tensor, ...]:
        found = kernel(*values)
        return found if isinstance(found, tuple) else (found,)  # type: ignore[return-value]

    before = [value.clone() for value in inputs]
    whole, again = run(inputs), run(inputs)
    for value, kept in zip(inputs, before, strict=True):
        assert torch.equal(value, kept)
    for row in range(len(inputs[0])):
        for number, alone in enumerate(run([value[row : row + 1] for value in inputs])):
            assert torch.equal(whole[number][row : row + 1], alone)
            assert torch.equal(whole[number], again[number])
