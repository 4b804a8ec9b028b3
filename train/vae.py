"""Train the VAE of `tiny`: ``python -m hcma_fast.train.vae --out .runs/tiny``.

Factor 4, 4 latent channels. The VAE bounds all that follows, so it comes first. L1 + MSE with a
light KL term, which keeps the latents smooth enough for the small errors of a denoiser.
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hcma_fast.files import write_folder
from hcma_fast.program import run_program
from hcma_fast.train.loop import LoopConfig, run
from hcma_fast.train.options import check_batch, recipe_parser
from hcma_fast.train.scenes_cache import rendered_scenes

KL_WEIGHT = 1e-4


def make_vae() -> AutoencoderKL:
    """The architecture of `tiny`'s VAE: 0.65 M parameters, 64 px -> 16 x 16 x 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class _Autoencoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return self.vae.decode(latents).sample, kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean PSNR in dB over images, of the posterior mean's reconstruction (peak-to-peak 2)."""
    values = []
    for start in range(0, len(images), 50):
        batch = to_tensor(images[start : start + 50])
        output = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((output - batch) ** 2).mean(dim=(1, 2, 3))
        values += (10 * torch.log10(4 / mse)).tolist()
    return math.fsum(values) / len(values)


def main() -> None:
    args = recipe_parser(__doc__, steps=2000, batch=16, scenes=16000, lr=3e-3).parse_args()
    check_batch(args.batch, args.scenes)

    torch.manual_seed(0)
    scenes = rendered_scenes(args.out, "train", args.scenes)
    validation = rendered_scenes(args.out, "val", 500)[:200]
    model = _Autoencoder(make_vae())

    def batch_of_step(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([1, step])
        images = to_tensor(scenes[np.sort(rng.choice(len(scenes), args.batch, replace=False))])
        noise = torch.randn(args.batch, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        return {"images": images, "noise": noise}

    def loss_of_step(step: int) -> dict[str, Tensor]:
        batch = batch_of_step(step)
        images = batch["images"]
        output, kl = model(images, batch["noise"])
        mse = (output - images).square().mean()
        l1 = (output - images).abs().mean()
        return {"loss": l1 + 4 * mse + KL_WEIGHT * kl, "mse": mse, "kl": kl}

    def report(step: int, averaged: _Autoencoder) -> None:
        averaged.eval()
        print(
            json.dumps({"step": step, "val_psnr_db": round(psnr(averaged.vae, validation), 2)}),
            flush=True,
        )

    config = LoopConfig(steps=args.steps, lr=args.lr, ema_decay=0.995)
    state = args.out / "vae-state"
    averaged = run(model, loss_of_step, config, state, report, batch_of_step=batch_of_step)
    vae = averaged.vae.eval()
    sample = to_tensor(scenes[:2000])
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.sample() for part in sample.split(100)])
    vae.register_to_config(scaling_factor=float(1 / means.std()))
    write_folder(args.out / "vae", vae.save_pretrained)


if __name__ == "__main__":
    sys.exit(run_program(main))
