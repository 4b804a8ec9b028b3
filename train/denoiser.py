"""Train the gated UNet of `tiny`: ``python -m hcma_fast.train.denoiser --out .runs/tiny``.

Noise prediction (Eq. 1) with min-SNR weights (gamma 5). Some steps run without the gated layers,
since `unet_plain` must denoise too; caption and grounding are dropped at times for guidance.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hcma_fast.schedule import add_noise, alphas_cumprod
from hcma_fast.train.grounding_attention import GroundingAttention
from hcma_fast.train.latents import SceneLatents
from hcma_fast.train.loop import LoopConfig, run
from hcma_fast.train.text import WIDTH

PLAIN_SHARE = 0.05
#: shares of the examples that lose caption and grounding (the unconditional half of guidance),
#: the caption alone, the grounding alone
DROP_BOTH, DROP_CAPTION, DROP_GROUNDING = 0.08, 0.35, 0.05
SNR_GAMMA = 5.0
ATTENTION_WEIGHT = 0.02


def make_unet() -> UNet2DConditionModel:
    """The architecture of `tiny`'s UNet: 5.5 M parameters, attention at 8 x 8 only."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        attention_type="gated",
    )
    for name, parameter in unet.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            # GLIGEN's gates start shut to spare a pretrained UNet; this one is trained from scratch
            nn.init.constant_(parameter, 0.8)
    return unet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".runs/tiny"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = SceneLatents(args.out, "train", args.scenes)
    model = make_unet()
    attention = GroundingAttention(model)
    alphas = alphas_cumprod().float()
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=SNR_GAMMA) / snr

    def loss_of_step(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([4, step])
        generator = torch.Generator().manual_seed(step + 10_000_000)
        lot = rng.random(args.batch)
        without_caption = lot < DROP_BOTH + DROP_CAPTION
        without_boxes = (lot < DROP_BOTH) | (lot > 1 - DROP_GROUNDING)
        batch = data.batch(step, args.batch, without_caption)
        noise = torch.randn(batch.z0.shape, generator=generator)
        # stratified over the schedule: less variance than independent draws
        offsets = (
            torch.arange(args.batch) + torch.rand(args.batch, generator=generator)
        ) / args.batch
        timesteps = (offsets * len(alphas)).long()
        mask = batch.mask * torch.from_numpy(~without_boxes).unsqueeze(-1)
        gligen = {"boxes": batch.boxes, "positive_embeddings": batch.labels, "masks": mask.float()}
        plain = rng.random() < PLAIN_SHARE
        predicted = model(
            add_noise(batch.z0, noise, timesteps),
            timesteps,
            batch.hidden,
            cross_attention_kwargs=None if plain else {"gligen": gligen},
        ).sample
        error = (predicted - noise).square().mean(dim=(1, 2, 3))
        where = attention.loss(batch.boxes, mask.float())
        loss = (error * weights[timesteps]).mean() + ATTENTION_WEIGHT * where
        return {"loss": loss, "mse": error.mean(), "attention": where}

    def keep(step: int, averaged: UNet2DConditionModel) -> None:
        averaged.save_pretrained(args.out / "unet")

    config = LoopConfig(
        steps=args.steps,
        lr=args.lr,
        warmup=200,
        weight_decay=0.01,
        ema_decay=0.9995,
        checkpoint_every=400,
    )
    run(model, loss_of_step, config, args.out / "denoiser-state", keep)


if __name__ == "__main__":
    main()
