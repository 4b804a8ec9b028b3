"""Train the decoder of `tiny`'s VAE further: ``hcma-fast train vae --decoder-only``.

The encoder stays as it is, so the latents that the denoiser learned stay valid, while pictures get
sharper. Latents come from the cache, which spares the encoder's share of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hcma_fast.files import write_folder
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.train.data.emoji_scenes import FIRST, Edition
from hcma_fast.train.data.scenes_cache import check_batch, rendered_scenes
from hcma_fast.train.loop.loop import LoopConfig, Record, check_can_go_on, run
from hcma_fast.train.tiny.latents import cached_posteriors, trained_part
from hcma_fast.train.tiny.sharp_loss import SharpLoss, reconstruction_loss
from hcma_fast.train.tiny.vae import psnr, to_tensor


class _Decoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.decoder(self.post_quant_conv(latents))
        return image


def train_decoder(
    out: Path,
    *,
    steps: int,
    batch: int,
    scenes: int,
    lr: float,
    on_log: Callable[[Record], None],
    edition: Edition = FIRST,
) -> Path:
    """Write ``out/vae-sharp`` from ``out/vae``, at each checkpoint; its folder is returned.

    Goes on from the newest state in ``out/vae-decoder-state``, where log.jsonl is too.

    Args:
        scenes: of the split "train", rendered and encoded into ``out`` once.
        on_log: called with the step to begin at, with each record of log.jsonl, and with the PSNR
            at each checkpoint.

    Raises:
        UsageError: a batch takes more scenes than there are.
        DivergenceError: a loss is not finite; its batch was saved.
        OutputError: ``out`` cannot be written, or the disk is full.
        WeightsError: there is no VAE yet, or the state is another model's, was begun with other
            settings, or is damaged.
    """
    check_batch(batch, scenes)
    draws: dict[str, int | float] = {"batch": batch, "scenes": scenes}
    config = LoopConfig(
        steps=steps,
        lr=lr,
        ema_decay=0.995,
        draws=draws if edition is FIRST else draws | {"edition": edition.number},
    )
    check_can_go_on(out / "vae-decoder-state", config)
    torch.manual_seed(0)
    vae = load_part(AutoencoderKL, trained_part(out / "vae", "hcma-fast train vae")).eval()
    pictures = rendered_scenes(out, "train", scenes, edition=edition)
    posteriors = cached_posteriors(out, vae, "train", scenes, edition)
    validation = rendered_scenes(out, "val", 500, edition=edition)[:200]
    model = _Decoder(vae.to(memory_format=torch.channels_last))
    loss_of = reconstruction_loss if edition is FIRST else SharpLoss()

    def batch_of_step(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([6, step])
        chosen = np.sort(rng.choice(scenes, batch, replace=False))
        mean, std = torch.from_numpy(posteriors[chosen]).float().unbind(1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
        return {"latents": mean + std * noise, "images": to_tensor(pictures[chosen])}

    def loss_of_step(step: int) -> dict[str, Tensor]:
        drawn = batch_of_step(step)
        loss, mse = loss_of(model(drawn["latents"]), drawn["images"])
        return {"loss": loss, "mse": mse}

    def keep(step: int, averaged: _Decoder) -> None:
        trained = AutoencoderKL.from_config(vae.config)
        trained.load_state_dict({**vae.state_dict(), **averaged.state_dict()})
        trained.eval()
        on_log({"step": step, "val_psnr_db": round(psnr(trained, validation), 2)})
        write_folder(out / "vae-sharp", trained.save_pretrained)

    averaged = run(
        model,
        loss_of_step,
        config,
        out / "vae-decoder-state",
        keep,
        batch_of_step=batch_of_step,
        on_log=on_log,
    )
    if not (out / "vae-sharp").is_dir():  # the run was over, and its export is gone
        keep(steps, averaged)
    return out / "vae-sharp"
