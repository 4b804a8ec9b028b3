"""One whole evaluation as one graph: align, denoise with guidance, combine by PLMS, step.

A backend that runs it makes one call per evaluation, and the caller hands back what it got.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcma_fast.errors import InputError
from hcma_fast.models.checkpoint.folder import ModelSource
from hcma_fast.schedule import PLMSTable
from hcma_fast.specs import PLAN_COLUMNS, PLAN_ROWS, STEP_NAMES, GraphName


def step_plan(table: PLMSTable, etas: Tensor) -> Tensor:
    """All coefficients of a trajectory, a row per evaluation: (1000, 10) float32, zero-padded.

    Columns: timestep, eta, scales of the sample and of the noise, four weights of the history,
    whether the stored sample is used (the corrector), whether the prediction joins the history.

    Args:
        table: of K <= 1000 evaluations; etas: (K,).

    Raises:
        InputError: ``etas`` has another length than the table.
    """
    if etas.shape != table.timesteps.shape:
        raise InputError(
            "there must be one alignment rate per evaluation",
            value=tuple(etas.shape),
            remedy=f"Give {len(table)} of them, see schedule.eta_table.",
        )
    columns = [
        table.timesteps,
        etas,
        table.sample_scale,
        table.noise_scale,
        *table.history_weights.unbind(1),
        table.uses_stored_sample,
        table.pushes_history,
    ]
    plan = torch.zeros(PLAN_ROWS, PLAN_COLUMNS)
    plan[: len(table)] = torch.stack([column.double() for column in columns], dim=1).float()
    return plan


class FusedStep(nn.Module):
    """The graphs `step_grounded` and `step_plain`, by the modules of `align` and of a UNet."""

    def __init__(self, align: nn.Module, unet: nn.Module, *, timed: bool) -> None:
        super().__init__()
        self.align, self.unet, self.timed = align, unet, timed

    def forward(
        self,
        z: Tensor,
        stored: Tensor,
        history: Tensor,
        index: Tensor,
        plan: Tensor,
        guidance_scale: Tensor,
        lambdas: Tensor,
        caption_embedding: Tensor,
        label_embeddings: Tensor,
        regions: Tensor,
        region_mask: Tensor,
        *contexts: Tensor,
    ) -> tuple[Tensor, ...]:
        """Evaluation ``index``.

        Args:
            z, stored: (B, 4, h, w), the latent, and the one that the previous evaluation started
                from; history: (B, 3, 4, h, w), earlier predictions, the newest first.
            index: (1,) int64; plan: see :func:`step_plan`; guidance_scale: (1,).
            contexts: (B, 2, T, W) each, both halves of the guidance, the unconditional first.
        Returns:
            z, stored, history and index for the next evaluation, loss_global (B,), loss_local
            (B, M).
        """
        row = plan.index_select(0, index)[0]
        batch = z.shape[0]
        time = row[0].round().to(torch.int64)
        fixed = (caption_embedding, label_embeddings, regions, region_mask)
        times = (time.expand(batch),) if self.timed else ()
        aligned, loss_global, loss_local = self.align(
            z, *fixed, row[1].expand(batch), lambdas, *times
        )
        # a rate of 0 leaves the latent as it is to the last bit, whatever the gradient
        aligned = torch.where(row[1] > 0, aligned, z)
        doubled = torch.stack([aligned, aligned], 1).flatten(0, 1)
        halves = (context.flatten(0, 1) for context in contexts)
        (eps,) = self.unet(doubled, time.expand(2 * batch), *halves)
        unconditional, conditional = eps.unflatten(0, (batch, 2)).unbind(1)
        eps = unconditional + guidance_scale * (conditional - unconditional)
        recent = torch.cat([eps.unsqueeze(1), history], 1)
        combined = (row[4:8].view(1, 4, 1, 1, 1) * recent).sum(1)
        start = torch.where(row[8] > 0, stored, aligned)
        moved = row[2] * start + row[3] * combined
        history = torch.where(row[9] > 0, recent[:, :3], history)
        return moved, aligned, history, index + 1, loss_global, loss_local


def graph_of(
    source: ModelSource, name: GraphName, height: int | None = None, width: int | None = None
) -> nn.Module:
    """Any graph of a model as a module, the step graphs included; see ``Components.graph``."""
    if name not in STEP_NAMES:
        return source.graph(name, height, width)
    unet: GraphName = "unet_grounded" if name == "step_grounded" else "unet_plain"
    timed = "timestep" in source.specs(height, width)["align"].input_names
    parts = (source.graph(part, height, width) for part in ("align", unet))
    return FusedStep(*parts, timed=timed)
