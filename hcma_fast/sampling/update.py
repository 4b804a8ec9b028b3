"""Guidance, PLMS and step in the captured sampler: one kernel on a GPU, few operators on a CPU.

Both keep the latent, the one that the corrector starts from and the history where they are, and
read the weights of an evaluation at a counter on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from hcma_fast.kernels.denoise_update import COLUMNS, RING, denoise_table, denoise_update_
from hcma_fast.sampling.loop import Schedule
from hcma_fast.schedule import PLMSTable
from hcma_fast.specs import PLAN_ROWS


class Update(Protocol):
    """Turns the latent of one evaluation into that of the next, in place."""

    z: Tensor
    """(B, C, h, w) the latent"""

    def load(self, schedules: Sequence[Schedule]) -> None:
        """Begin anew.

        Args:
            schedules: one per image, or one for all.
        """
        ...

    def __call__(self, step: Tensor, unconditional: Tensor | None, conditional: Tensor) -> None:
        """See :func:`hcma_fast.kernels.denoise_update.denoise_update_`.

        Args:
            step: (1,) int64, the evaluation; unconditional, conditional: (B, C, h, w) predictions,
            the first None without guidance.
        """
        ...


class KernelUpdate:
    """By the registered op, which is one launch of a Triton kernel on a GPU.

    Args:
        shape: (B, C, h, w); dtype: of the latent and the history.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.z = torch.zeros(shape, dtype=dtype, device=device)
        self.stored = torch.zeros_like(self.z)
        self.history = torch.zeros(RING, *shape, dtype=dtype, device=device)
        self.table = torch.zeros(shape[0], PLAN_ROWS, COLUMNS, device=device)

    def load(self, schedules: Sequence[Schedule]) -> None:
        """See :meth:`Update.load`; what is in the history has no weight until it is written."""
        self.table.copy_(_tables(schedules))

    def __call__(self, step: Tensor, unconditional: Tensor | None, conditional: Tensor) -> None:
        """See :meth:`Update.__call__`."""
        denoise_update_(
            self.z, self.history, self.stored, unconditional, conditional, self.table, step
        )


class OperatorUpdate:
    """The same by plain operators into memory of its own, a fraction of what the op costs on a CPU.

    Latent, stored latent and history lie in one tensor, since each is a row of the same sum: the
    next latent is all of them and the prediction, weighted. Rows are then written where the table
    says so. A latent that is not finite stays so: a weight of 0 does not hide it, as the op does in
    the corrector.

    Args:
        shape: (B, C, h, w); dtype: of the latent and the history.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        batch, images = shape[0], (shape[0], *[1] * (len(shape) - 1))
        rows = 2 + RING
        self.state = torch.zeros(rows, *shape, dtype=dtype, device=device)
        self.z = self.state[0]
        self.changed = torch.zeros_like(self.state)
        # per evaluation, row and image; the last row is the prediction's
        self.weights = torch.zeros(PLAN_ROWS, rows + 1, batch, device=device)
        self.writes = torch.zeros(PLAN_ROWS, rows, batch, dtype=torch.bool, device=device)
        self.guidance = torch.zeros(images, device=device)
        # those of the current evaluation
        self.weight = torch.zeros(1, rows + 1, batch, device=device)
        self.write = torch.zeros(1, rows, batch, dtype=torch.bool, device=device)
        self.eps = torch.zeros(shape, device=device)
        self.terms = torch.zeros(rows + 1, *shape, device=device)
        by_row = self.weight.view(rows + 1, *images)
        self._of_state = (by_row[:rows], self.terms[:rows])
        self._of_eps = (by_row[rows], self.terms[rows])
        self._next = (self.changed[0], self.changed[1], self.changed[2:])
        # the sum itself is as wide as its terms
        narrow = dtype != torch.float32
        self.moved = torch.zeros(shape, device=device) if narrow else self._next[0]
        self._written = self.write.view(rows, *images)

    def load(self, schedules: Sequence[Schedule]) -> None:
        """See :meth:`Update.load`."""
        columns = _tables(schedules).unbind(-1)
        guidance, current, *slots, of_start, of_noise, slot, uses, stores = columns
        # the corrector starts from the stored latent, the others from the current one
        weights = [of_start * (1 - uses), of_start * uses]
        weights += [of_noise * weight for weight in (*slots, current)]
        # behind an image's last evaluation nothing is written, whatever the prediction
        writes = [of_noise != 0, stores != 0, *(slot == number for number in range(RING))]
        self.weights.copy_(torch.stack(weights).permute(2, 0, 1))
        self.writes.copy_(torch.stack(writes).permute(2, 0, 1))
        self.guidance.view(-1).copy_(guidance[:, 0])
        # a weight of 0 does not stop a NaN of a batch before
        self.state[1:].zero_()

    def __call__(self, step: Tensor, unconditional: Tensor | None, conditional: Tensor) -> None:
        """See :meth:`Update.__call__`."""
        torch.index_select(self.weights, 0, step, out=self.weight)
        torch.index_select(self.writes, 0, step, out=self.write)
        if unconditional is None:
            self.eps.copy_(conditional)
        else:
            torch.sub(conditional, unconditional, out=self.eps)
            self.eps.mul_(self.guidance).add_(unconditional)
        weight, terms = self._of_state
        torch.mul(self.state, weight, out=terms)
        weight, terms = self._of_eps
        torch.mul(self.eps, weight, out=terms)
        torch.sum(self.terms, 0, out=self.moved)
        z, stored, history = self._next
        if self.moved is not z:
            z.copy_(self.moved)
        stored.copy_(self.z)
        history.copy_(self.eps)
        torch.where(self._written, self.changed, self.state, out=self.state)


def _tables(schedules: Sequence[Schedule]) -> Tensor:
    """(B, 1000, 10) float64, see :func:`hcma_fast.kernels.denoise_update.denoise_table`."""
    return torch.cat([_table(s.table, s.guidance_scale) for s in schedules])


@lru_cache(maxsize=32)
def _table(table: PLMSTable, guidance_scale: float) -> Tensor:
    """Kept, since it takes longer to fill in than all the evaluations' operators together.

    A table is found again as itself, not by its values: `plms_table` keeps its own.
    """
    return denoise_table(table, guidance_scale, PLAN_ROWS)
