"""Train the aligner of `tiny`: ``python -m hcma_fast.train.aligner --out .runs/tiny``.

Stage 1 of Algorithm 1: ViT and heads on q_sample latents of real scenes at uniform t, with both
losses (Eq. 6, 7); VAE and text encoder are frozen. The label retrieval that is logged shows whether
the region features tell categories apart, which a low loss alone would not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hcma_fast.config import AlignerConfig
from hcma_fast.losses import global_loss, local_loss, local_mean
from hcma_fast.models.aligner import Aligner
from hcma_fast.schedule import TRAIN_STEPS, add_noise
from hcma_fast.train.latents import SceneLatents
from hcma_fast.train.loop import LoopConfig, run
from hcma_fast.train.text import WIDTH


def make_aligner() -> Aligner:
    """The architecture of `tiny`'s aligner: 0.9 M parameters, patch 2 on a 16 x 16 latent."""
    config = AlignerConfig(
        latent_size=16, patch_size=2, width=128, depth=4, heads=4, text_width=WIDTH
    )
    return Aligner(config)


def label_retrieval(f_local: Tensor, label_table: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Share of valid boxes whose feature is nearest, by cosine, to its own label of all labels.

    Args:
        f_local, labels: (B, M, d); label_table: (L, d); mask: (B, M). Returns a scalar in [0, 1].
    """
    found = F.normalize(f_local, dim=-1) @ F.normalize(label_table, dim=-1).T
    wanted = F.normalize(labels, dim=-1) @ F.normalize(label_table, dim=-1).T
    right = (found.argmax(-1) == wanted.argmax(-1)).float() * mask
    return right.sum() / mask.sum().clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".runs/tiny"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--lr", type=float, default=1e-3, help="the paper's")
    args = parser.parse_args()

    torch.manual_seed(0)
    data = SceneLatents(args.out, "train", args.scenes)
    model = make_aligner()

    def loss_of_step(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step + 20_000_000)
        batch = data.batch(step, args.batch)
        noise = torch.randn(batch.z0.shape, generator=generator)
        timesteps = torch.randint(0, TRAIN_STEPS, (args.batch,), generator=generator)
        z = add_noise(batch.z0, noise, timesteps)
        regions = model.region_map(batch.boxes, batch.mask)
        f_global, f_local = model.features(z, regions, timesteps)
        omega_global = global_loss(f_global, batch.caption).mean()
        per_box = local_loss(f_local, batch.labels, batch.mask)
        omega_local = local_mean(per_box, batch.mask).mean()
        early = batch.mask * (timesteps < TRAIN_STEPS // 2).unsqueeze(-1)
        return {
            "loss": omega_global + omega_local,
            "global": omega_global,
            "local": omega_local,
            "label_r1": label_retrieval(f_local, data.label_table, batch.labels, batch.mask),
            "label_r1_low_noise": label_retrieval(f_local, data.label_table, batch.labels, early),
        }

    def keep(step: int, averaged: Aligner) -> None:
        averaged.save_pretrained(args.out / "aligner", dtype=torch.float16)

    config = LoopConfig(steps=args.steps, lr=args.lr, weight_decay=5e-4, ema_decay=0.995)
    run(model, loss_of_step, config, args.out / "aligner-state", keep)


if __name__ == "__main__":
    main()
