"""Train the VAE of `tiny`: ``hcma-fast train vae``.

It bounds all that follows, so it comes first. Both editions have latents of 16 x 16 x 4: the first
of 64 pixels (factor 4), the second of 128 (factor 8). A light KL term keeps the latents smooth
enough for the small errors of a denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hcma_fast.files import write_folder, write_whole
from hcma_fast.train.data.emoji_scenes import FIRST, Edition
from hcma_fast.train.data.scenes_cache import check_batch, draw_scenes, rendered_scenes
from hcma_fast.train.loop.loop import LoopConfig, Record, check_can_go_on, run
from hcma_fast.train.tiny.sharp_loss import SharpLoss, reconstruction_loss

KL_WEIGHT = 1e-4


#: channels from the largest to the smallest resolution, by edition
_CHANNELS = {1: (16, 32, 64), 2: (16, 32, 96, 160)}
_EMA_DECAY = {1: 0.995, 2: 0.999}
#: a state of the second edition is minutes of work
_CHECKPOINT_EVERY = {1: 200, 2: 100}
_SHOWN = 12


def make_vae(edition: Edition = FIRST) -> AutoencoderKL:
    """The architecture of `tiny`'s VAE: 0.65 M parameters for the first edition's 64 pixels, 4.2 M
    for the second's 128."""
    channels = _CHANNELS[edition.number]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=edition.image_size,
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


def save_pairs(path: Path, vae: AutoencoderKL, images: NDArray[np.uint8]) -> None:
    """A picture of ``images`` (B, H, W, 3), each above its reconstruction, twice their size.

    Raises:
        OutputError: it cannot be written.
    """
    with torch.no_grad():
        output = vae.decode(vae.encode(to_tensor(images)).latent_dist.mean).sample
    restored = ((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    half = len(images) // 2
    rows = [part for few in (images, restored) for part in (few[:half], few[half : 2 * half])]
    sheet = np.concatenate([np.concatenate(list(rows[i]), axis=1) for i in (0, 2, 1, 3)])
    picture = Image.fromarray(sheet.repeat(2, axis=0).repeat(2, axis=1))
    write_whole(path, lambda file: picture.save(file, "PNG"))


def train_vae(
    out: Path,
    *,
    steps: int,
    batch: int,
    scenes: int,
    lr: float,
    on_log: Callable[[Record], None],
    edition: Edition = FIRST,
) -> Path:
    """Write ``out/vae``, at each checkpoint; its folder is returned.

    Goes on from the newest state in ``out/vae-state``, where log.jsonl and reconstructions.png are
    too.

    Args:
        scenes: of the split "train"; they are drawn anew in each step.
        on_log: called with the step to begin at, with each record of log.jsonl, and with the PSNR
            at each checkpoint.

    Raises:
        UsageError: a batch takes more scenes than there are.
        DivergenceError: a loss is not finite; its batch was saved.
        OutputError: ``out`` cannot be written, or the disk is full.
        WeightsError: the state is another model's, was begun with other settings, or is damaged.
    """
    check_batch(batch, scenes)
    draws: dict[str, int | float] = {"batch": batch, "scenes": scenes}
    config = LoopConfig(
        steps=steps,
        lr=lr,
        ema_decay=_EMA_DECAY[edition.number],
        checkpoint_every=_CHECKPOINT_EVERY[edition.number],
        draws=draws if edition is FIRST else draws | {"edition": edition.number},
    )
    state = out / "vae-state"
    check_can_go_on(state, config)
    torch.manual_seed(0)
    validation = rendered_scenes(out, "val", 500, edition=edition)[:200]
    # convolutions of these widths run a quarter faster so
    model = _Autoencoder(make_vae(edition).to(memory_format=torch.channels_last))
    loss_of = reconstruction_loss if edition is FIRST else SharpLoss()

    def batch_of_step(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([1, step])
        chosen = np.sort(rng.choice(scenes, batch, replace=False)).tolist()
        images = to_tensor(draw_scenes(edition, "train", chosen, edition.image_size))
        noise = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        return {"images": images, "noise": noise}

    def loss_of_step(step: int) -> dict[str, Tensor]:
        drawn = batch_of_step(step)
        images = drawn["images"].to(memory_format=torch.channels_last)
        output, kl = model(images, drawn["noise"])
        loss, mse = loss_of(output, images)
        return {"loss": loss + KL_WEIGHT * kl, "mse": mse, "kl": kl}

    def keep(step: int, averaged: _Autoencoder) -> None:
        vae = averaged.vae.eval()
        on_log({"step": step, "val_psnr_db": round(psnr(vae, validation), 2)})
        save_pairs(state / "reconstructions.png", vae, validation[:_SHOWN])
        with torch.no_grad():
            parts = to_tensor(validation).split(50)
            latents = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
        write_folder(out / "vae", vae.save_pretrained)

    averaged = run(
        model,
        loss_of_step,
        config,
        state,
        keep,
        batch_of_step=batch_of_step,
        on_log=on_log,
    )
    if not (out / "vae").is_dir():  # the run was over, and its export is gone
        keep(steps, averaged)
    return out / "vae"
