"""Guidance by an attention loss as the sampler's `align`: one hook for all peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hcma_fast.bench.quality.methods.attention import AttentionMap, AttentionUNet
from hcma_fast.errors import UsageError
from hcma_fast.sampling.solvers import plms
from hcma_fast.schedule import alphas_cumprod
from hcma_fast.specs import IOSpec


@dataclass(frozen=True)
class GuidanceStep:
    """One PLMS step of one image, as its guide sees it."""

    number: int
    """from 0"""
    total: int
    timestep: Tensor
    """(1,)"""
    text_context: Tensor
    """(1, 77, W), the caption's half"""
    unet: AttentionUNet

    @property
    def abar(self) -> float:
        """abar_t of this step."""
        return float(alphas_cumprod()[int(self.timestep[0])])

    def forward(self, z: Tensor) -> tuple[Tensor, list[AttentionMap]]:
        """One pass of the UNet at z (1, 4, h, w): the leaf to differentiate by, and the maps."""
        leaf = z.detach().requires_grad_()
        return leaf, self.unet.maps(leaf, self.timestep, self.text_context)

    def gradient(self, loss: Tensor, leaf: Tensor) -> Tensor:
        """Of a loss on the maps of ``forward``, with respect to the latent: (1, 4, h, w).

        Raises:
            UsageError: it is not finite.
        """
        self.unet.passes.backward += 1
        (found,) = torch.autograd.grad(loss, leaf)
        if not bool(found.isfinite().all()):
            raise UsageError(
                "the guidance diverged: its gradient is not finite",
                value=float(loss.detach()),
                remedy="Use another seed, or leave this method out.",
            )
        return found


class Guide(Protocol):
    """A peer's guidance of one image."""

    def __call__(self, z: Tensor, step: GuidanceStep) -> tuple[Tensor, float | None]:
        """z (1, 4, h, w) before a denoising step -> z to denoise, and the loss, if it had one."""
        ...


class GuidanceEngine:
    """An :class:`~hcma_fast.engine.Engine` in place of `align`, for one run of a batch.

    Images are guided one after the other: refinement stops at each one's own time, and an image
    does not depend on its batch. Steps are told by their timestep, which no two of them share.
    """

    def __init__(
        self, spec: IOSpec, unet: AttentionUNet, guides: Sequence[Guide | None], steps: int
    ) -> None:
        """``guides``: one per image of the batch; None for one that has nothing to guide."""
        self.spec, self._unet, self._guides, self._total = spec, unet, guides, steps
        self._numbers = {row.timestep: row.step for row in plms(steps).evaluations if row.aligns}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """z_aligned; loss_global is the peer's loss, NaN at steps without; loss_local is 0."""
        z, times = inputs["z"], inputs["timestep"]
        number = self._numbers[int(times[0])]
        # both halves of the guidance, the unconditional one first; or no guidance and one half
        context = inputs["text_context"][-len(z) :]
        moved, losses = [], []
        for row, guide in enumerate(self._guides):
            one = slice(row, row + 1)
            latent, loss = z[one], None
            if guide is not None:
                step = GuidanceStep(number, self._total, times[one], context[one], self._unet)
                with torch.enable_grad():
                    latent, loss = guide(latent, step)
            moved.append(latent)
            losses.append(float("nan") if loss is None else loss)
        return {
            "z_aligned": torch.cat(moved),
            "loss_global": torch.tensor(losses, device=z.device),
            "loss_local": torch.zeros_like(inputs["region_mask"]),
        }
