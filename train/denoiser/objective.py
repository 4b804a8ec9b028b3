"""The objective of stage 2: the noise of aligned latents (line 13 of the paper's Algorithm 1).

Which images are aligned, at which rate, and which lose caption or boxes follows from the seed of
the micro-batch, as the noise does. In validation nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.models.aligner import AlignStep
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.models.text import tokenize_cut
from hcma_fast.models.unet import attention_blocks
from hcma_fast.schedule import in_window
from hcma_fast.train.aligner.objective import BUCKETS, Noised, by_bucket, draw_noised, means
from hcma_fast.train.data.latent_cache import Batch, LatentCache
from hcma_fast.train.denoiser.alignment import align_rows
from hcma_fast.train.denoiser.settings import DenoiserTraining, Trainable

QUANTITIES = ("mse", "mse_aligned")


class NoisePredictor(nn.Module):
    """The gated UNet, the position net included, as one forward: DDP wants it so."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        z: Tensor,
        timesteps: Tensor,
        hidden: Tensor,
        boxes: Tensor,
        labels: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """z (B, C, h, w), timesteps (B,), hidden (B, 77, d), boxes (B, M, 4), labels (B, M, d),
        mask (B, M) -> noise (B, C, h, w)."""
        gligen = {"boxes": boxes, "positive_embeddings": labels, "masks": mask}
        found: Tensor = self.unet(
            z, timesteps, hidden, cross_attention_kwargs={"gligen": gligen}, return_dict=False
        )[0]
        return found


def trained_layers(unet: UNet2DConditionModel, trainable: Trainable) -> nn.Module:
    """Position net and gated attention layers, or all; nothing else of it takes a gradient."""
    unet.requires_grad_(trainable == "all")
    if trainable == "all":
        found: nn.Module = unet
        return found
    fusers = (block.fuser for block in attention_blocks(unet))
    return nn.ModuleList([unet.position_net, *fusers]).requires_grad_()


@dataclass(frozen=True)
class Conditioned(Noised):
    """A noised batch with what the denoiser is told of it; ``z`` is aligned where ``aligned``."""

    hidden: Tensor
    """(B, 77, d), of the empty caption where it was dropped"""
    caption: Tensor
    """(B, d), pooled, never dropped: for the alignment"""
    boxes: Tensor
    """(B, 30, 4)"""
    labels: Tensor
    """(B, 30, d)"""
    mask: Tensor
    """(B, 30), 0 for padding"""
    kept: Tensor
    """(B, 1), 0 where the denoiser is not told the boxes"""
    aligned: Tensor
    """(B,) bool"""


class NoiseObjective:
    """The squared error of the noise; see :class:`hcma_fast.train.loop.stage.Objective`.

    Args:
        parts: the model; all of it is moved to ``device``, and all but the trained layers frozen.
        captions: of the cache, in its order.
        write: writes the export.
    """

    shape = (len(QUANTITIES), 2, BUCKETS)

    def __init__(
        self,
        parts: Components,
        cache: LatentCache,
        captions: Sequence[str],
        training: DenoiserTraining,
        device: torch.device,
        write: Callable[[Path, UNet2DConditionModel], None],
    ) -> None:
        self.unet: UNet2DConditionModel = parts.unet.to(device)
        self.trained = trained_layers(self.unet, training.trainable)
        self.network = NoisePredictor(self.unet)
        if training.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.tokenizer, self.text_encoder = parts.tokenizer, parts.text_encoder.to(device)
        aligner = parts.own_aligner.to(device).requires_grad_(False)
        self.align = AlignStep(aligner, normalized=parts.settings.normalized)
        self.settings, self.training = parts.settings, training
        self.label_table = cache.label_table.to(device)
        self.scale, self.captions = cache.header.scaling_factor, captions
        self.write = write

    def draw(self, batch: Batch, seed: int, timesteps: Tensor | None = None) -> Conditioned:
        """See :class:`hcma_fast.train.loop.stage.Objective`."""
        noised = draw_noised(batch, self.scale, seed, timesteps)
        device, count, training = noised.z.device, len(noised.z), self.training
        rng = np.random.default_rng(seed)
        lots = rng.random((4, count))
        inside = in_window(noised.timesteps.cpu(), self.settings).numpy()
        aligned = (lots[0] < training.aligned_share) & inside
        learning = timesteps is None
        silent = (lots[1] < training.drop_caption) & learning
        kept = (lots[2] >= training.drop_boxes) | (not learning)
        chosen = [self.captions[index] for index in batch.caption_index.tolist()]
        padding = MAX_OBJECTS - batch.mask.shape[1]
        found = Conditioned(
            **vars(noised),
            hidden=self._encode(["" if s else t for s, t in zip(silent, chosen, strict=True)]),
            caption=batch.caption,
            boxes=F.pad(batch.boxes, (0, 0, 0, padding)),
            labels=F.pad(self.label_table[batch.labels], (0, 0, 0, padding)),
            mask=F.pad(batch.mask, (0, padding)),
            kept=torch.from_numpy(kept.astype(np.float32)).to(device).unsqueeze(1),
            aligned=torch.from_numpy(aligned).to(device),
        )
        return self._align(found, lots[3][aligned])

    def _align(self, found: Conditioned, lots: NDArray[np.float64]) -> Conditioned:
        device, rows = found.z.device, found.aligned.nonzero().squeeze(1)
        # on average the rate of sampling, either way
        shares = 2 * lots if self.training.rates == "uniform" else np.ones_like(lots)
        eta0 = torch.from_numpy(shares * self.settings.eta0).float().to(device)
        weights = (self.settings.lambda_global, self.settings.lambda_local)
        lambdas = torch.tensor(weights, device=device).expand(len(rows), 2)
        moved = align_rows(self.align, found.z, found, found.timesteps, rows, eta0, lambdas)
        return Conditioned(**(vars(found) | {"z": moved}))

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Hidden states (B, 77, d); the cache's captions were cut in the same way."""
        ids = tokenize_cut(self.tokenizer, texts).to(self.text_encoder.device)
        hidden: Tensor = self.text_encoder(input_ids=ids).last_hidden_state
        return hidden

    def losses(self, network: nn.Module, drawn: Conditioned) -> tuple[Tensor, Tensor]:
        """See :class:`hcma_fast.train.loop.stage.Objective`."""
        bf16 = self.training.bf16
        with torch.autocast(drawn.z.device.type, torch.bfloat16, enabled=bf16):
            predicted = network(
                drawn.z,
                drawn.timesteps,
                drawn.hidden,
                drawn.boxes,
                drawn.labels,
                drawn.mask * drawn.kept,
            )
        errors = (predicted.float() - drawn.noise).square().mean(dim=(1, 2, 3))
        found, aligned = errors.detach(), drawn.aligned.float()
        values, counts = (found, found * aligned), (torch.ones_like(aligned), aligned)
        return errors, by_bucket(values, counts, drawn.timesteps)

    def summary(self, statistics: Tensor) -> dict[str, Any]:
        """See :class:`hcma_fast.train.loop.stage.Objective`."""
        found = means(statistics, QUANTITIES)
        return {"loss": found["mse"], **found}

    def export(self, folder: Path) -> None:
        """See :class:`hcma_fast.train.loop.stage.Objective`."""
        self.write(folder, self.unet)

    def parts(self) -> Mapping[str, nn.Module]:
        """See :class:`hcma_fast.train.loop.stage.Objective`."""
        return {"unet": self.unet}
