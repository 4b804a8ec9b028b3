"""Train the VAE of `tiny`: ``hcma-fast train vae``.

Factor 4, 4 latent channels. The VAE bounds all that follows, so it comes first. L1 + MSE with a
light KL term, which keeps the latents smooth enough for the small errors of a denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hcma_fast.files import write_folder
from hcma_fast.train.data.scenes_cache import check_batch, rendered_scenes
from hcma_fast.train.loop.loop import LoopConfig, Record, check_can_go_on, run

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


def reconstruction_loss(output: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """L1 + 4 MSE, and the MSE, of pictures of the same shape."""
    mse, l1 = (output - images).square().mean(), (output - images).abs().mean()
    return l1 + 4 * mse, mse


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


def train_vae(
    out: Path,
    *,
    steps: int,
    batch: int,
    scenes: int,
    lr: float,
    on_log: Callable[[Record], None],
) -> Path:
    """Write ``out/vae``, whose folder is returned.

    Goes on from the newest state in ``out/vae-state``, where log.jsonl is too.

    Args:
        scenes: of the split "train", rendered into ``out`` once.
        on_log: called with the step to begin at, with each record of log.jsonl, and with the PSNR
            at each checkpoint.

    Raises:
        UsageError: a batch takes more scenes than there are.
        DivergenceError: a loss is not finite; its batch was saved.
        OutputError: ``out`` cannot be written, or the disk is full.
        WeightsError: the state is another model's, was begun with other settings, or is damaged.
    """
    check_batch(batch, scenes)
    config = LoopConfig(
        steps=steps, lr=lr, ema_decay=0.995, draws={"batch": batch, "scenes": scenes}
    )
    check_can_go_on(out / "vae-state", config)
    torch.manual_seed(0)
    pictures = rendered_scenes(out, "train", scenes)
    validation = rendered_scenes(out, "val", 500)[:200]
    model = _Autoencoder(make_vae())

    def batch_of_step(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([1, step])
        images = to_tensor(pictures[np.sort(rng.choice(scenes, batch, replace=False))])
        noise = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        return {"images": images, "noise": noise}

    def loss_of_step(step: int) -> dict[str, Tensor]:
        drawn = batch_of_step(step)
        images = drawn["images"]
        output, kl = model(images, drawn["noise"])
        loss, mse = reconstruction_loss(output, images)
        return {"loss": loss + KL_WEIGHT * kl, "mse": mse, "kl": kl}

    def report(step: int, averaged: _Autoencoder) -> None:
        averaged.eval()
        on_log({"step": step, "val_psnr_db": round(psnr(averaged.vae, validation), 2)})

    averaged = run(
        model,
        loss_of_step,
        config,
        out / "vae-state",
        report,
        batch_of_step=batch_of_step,
        on_log=on_log,
    )
    vae = averaged.vae.eval()
    sample = to_tensor(pictures[:2000])
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.sample() for part in sample.split(100)])
    vae.register_to_config(scaling_factor=float(1 / means.std()))
    write_folder(out / "vae", vae.save_pretrained)
    return out / "vae"
