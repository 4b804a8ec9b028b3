"""The aligner: ViT and heads, its losses, and the alignment step (paper Eq. 6 to 8)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from hcma_fast.config import AlignerConfig
from hcma_fast.errors import WeightsError
from hcma_fast.kernels.cosine_loss import Outputs as LossesAndSlopes
from hcma_fast.kernels.cosine_loss import cosine_loss_reference
from hcma_fast.losses import global_loss, local_loss
from hcma_fast.models.checkpoint.json_files import first_line, read_object, shorten
from hcma_fast.models.checkpoint.weight_files import WeightFile, read_weights
from hcma_fast.models.heads import CaptionHead, Pool, RegionHead
from hcma_fast.models.vit import LatentViT

_NORM_FLOOR = 1e-12
_FLOAT16_SCALE = 2.0**10
"""Of the objective, where the backward pass runs in float16: small gradients would become 0"""


class Aligner(nn.Module):
    """Reads a noisy latent and says how far it is from its caption and its boxes' labels."""

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = LatentViT(config)
        self.caption_head = CaptionHead(config)
        self.region_head = RegionHead(config)

    def region_map(
        self, boxes: Tensor, mask: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """(B, M, 4), (B, M) -> region map (B, M, N); see :meth:`RegionHead.region_map`."""
        return self.region_head.region_map(boxes, mask, grid)

    def features(
        self,
        z: Tensor,
        regions: Tensor,
        timestep: Tensor | None = None,
        pool: Pool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z (B, C, h, w), regions (B, M, N) -> f^G (B, d_t), f^L (B, M, d_l).

        Args:
            pool: see :meth:`RegionHead.forward`.
        """
        image, cells = self.vit(z, timestep)
        return self.caption_head(image), self.region_head(cells, regions, pool)

    def losses(
        self,
        z: Tensor,
        caption: Tensor,
        labels: Tensor,
        regions: Tensor,
        mask: Tensor,
        timestep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Omega^G (B,) and the summands of Omega^L per box (B, M) (Eq. 6, 7)."""
        f_global, f_local = self.features(z, regions, timestep)
        return global_loss(f_global, caption), local_loss(f_local, labels, mask)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, each by a temporary name."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: value.detach().to(dtype or value.dtype).contiguous()
            for name, value in self.state_dict().items()
        }
        contents = {
            "config.json": (
                json.dumps(self.config.model_dump(exclude_none=True), indent=2) + "\n"
            ).encode(),
            "model.safetensors": save(state),
        }
        for name, content in contents.items():
            partial = folder / f".{name}.part"
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(folder / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Aligner:
        """Read what :meth:`save_pretrained` wrote, as float32.

        Raises:
            WeightsError: a file is missing, damaged, or does not fit the config.
        """
        folder = Path(folder)
        try:
            config = AlignerConfig.model_validate(read_object(folder / "config.json"))
            # on the meta device: a shape that no file has costs no memory
            with torch.device("meta"):
                shapes = {name: tuple(v.shape) for name, v in cls(config).state_dict().items()}
            file = folder / "model.safetensors"
            weights, unknown = read_weights("the aligner", [WeightFile(file)], shapes)
            aligner = cls(config)
            aligner.load_state_dict(weights)
        except (ValidationError, RuntimeError) as error:
            raise _damaged(folder, first_line(error)) from error
        except WeightsError as error:
            raise _damaged(folder, error.what) from error
        if unknown:
            raise _damaged(
                folder, f"it has {len(unknown)} weights of another model, {shorten(unknown[0])}"
            )
        return aligner.eval()


def _damaged(folder: Path, problem: str) -> WeightsError:
    return WeightsError(
        f"the aligner cannot be loaded: {problem}",
        value=str(folder),
        remedy="Give a folder with config.json and model.safetensors of one aligner.",
    )


class AlignStep(nn.Module):
    """The `align` graph: forward, backward and update of the latent, one pure function (Eq. 8).

    Args:
        losses: both losses and their gradient with respect to the features, in plain torch, or
            ``kernels.cosine_loss.cosine_loss_op``, which is one launch on a GPU.
        pool: of the features over the boxes, see :meth:`RegionHead.forward`; the kernel's is
            ``kernels.region_pool.region_pool``.
    """

    def __init__(
        self,
        aligner: Aligner,
        *,
        normalized: bool = False,
        losses: Callable[..., LossesAndSlopes] = cosine_loss_reference,
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        self.aligner = aligner
        self.normalized = normalized
        self.losses = losses
        self.pool = pool

    def forward(
        self,
        z: Tensor,
        caption_embedding: Tensor,
        label_embeddings: Tensor,
        regions: Tensor,
        region_mask: Tensor,
        eta: Tensor,
        lambdas: Tensor,
        timestep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes as in ``specs.graph_specs``: -> z_aligned, loss_global (B,), loss_local (B, M)."""

        aligner = self.aligner
        half = aligner.vit.project.weight.dtype == torch.float16
        scale = _FLOAT16_SCALE if half else 1.0
        # autograd rather than torch.func.grad: functorch fixes the batch size when it is traced
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            features = aligner.features(leaf, regions, timestep, self.pool)
            # the losses' own gradient in closed form: autograd would take four times the nodes.
            # Of the sum over the batch, so that each image's gradient is its own.
            _, loss_global, loss_local, *slopes = self.losses(
                features[0].detach(),
                caption_embedding,
                features[1].detach(),
                label_embeddings,
                region_mask,
                lambdas * scale,
            )
            (gradient,) = torch.autograd.grad(features, leaf, slopes)
            gradient = gradient / scale if half else gradient
        rate = eta.view(-1, 1, 1, 1)
        if self.normalized:
            rate = rate * _norm(z) / _norm(gradient)
        return z - rate * gradient, loss_global, loss_local


def _norm(value: Tensor) -> Tensor:
    """Norm per image, (B, 1, 1, 1), never 0."""
    return (value * value).sum(dim=(1, 2, 3), keepdim=True).clamp(min=_NORM_FLOOR).sqrt()
