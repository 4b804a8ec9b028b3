"""One whole evaluation as one graph: align, denoise with guidance, combine, step.

A backend that runs it makes one call per evaluation, and the caller hands back what it got.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcma_fast.kernels.update_sums import columns_of, denoise_update_rows, update_of
from hcma_fast.models.checkpoint.folder import ModelSource
from hcma_fast.specs import PLAN_ROWS, STEP_NAMES, Column, GraphName


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
        lambdas: Tensor,
        caption_embedding: Tensor,
        label_embeddings: Tensor,
        regions: Tensor,
        region_mask: Tensor,
        *contexts: Tensor,
    ) -> tuple[Tensor, ...]:
        """The evaluation that each image stands at.

        Args:
            z, stored: (B, 4, h, w); history: (B, HISTORY, 4, h, w), the newest first.
            index: (B,) int64, the evaluation; plan: (B, PLAN_ROWS, PLAN_COLUMNS), see
                ``specs.Column``.
            contexts: (B, 2, T, W) each, both halves of the guidance, the unconditional first: of
                the text, and of the boxes with gated attention.
        Returns:
            z, stored, history and index for the next evaluation, loss_global (B,), loss_local
            (B, M).
        """
        at = index.view(-1, 1, 1).expand(-1, 1, plan.shape[2])
        rows = plan.gather(1, at).squeeze(1)
        columns = columns_of(rows, z.dim())
        time = rows[:, Column.TIMESTEP].round().to(torch.int64)
        eta = rows[:, Column.ETA]
        fixed = (caption_embedding, label_embeddings, regions, region_mask)
        times = (time,) if self.timed else ()
        aligned, loss_global, loss_local = self.align(z, *fixed, eta, lambdas, *times)
        # a rate of 0 leaves the latent as it is to the last bit, whatever the gradient
        aligned = torch.where(columns[Column.ETA] > 0, aligned, z)
        doubled = torch.stack([aligned, aligned], 1).flatten(0, 1)
        halves = [context.flatten(0, 1) for context in contexts]
        if len(contexts) == 2:
            gate = rows[:, Column.GATE]
            halves.append(torch.stack([gate, gate], 1).flatten())
        (eps,) = self.unet(doubled, torch.stack([time, time], 1).flatten(), *halves)
        unconditional, conditional = eps.unflatten(0, (z.shape[0], 2)).unbind(1)
        moved, held, recent = denoise_update_rows(
            aligned,
            stored,
            history.unbind(1),
            unconditional,
            conditional,
            aligned - z,
            None,
            update_of(columns),
        )
        history = torch.stack([*recent], 1)
        following = (index + 1).clamp(max=PLAN_ROWS - 1)
        return moved, held, history, following, loss_global, loss_local


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
