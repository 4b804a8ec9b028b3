"""Train the VAE's decoder further: ``python -m hcma_fast.train.vae_decoder --out .runs/tiny``.

The encoder stays as it is, so the latents that the denoiser learned stay valid, while pictures get
sharper. Latents come from the cache, which spares the encoder's share of the work.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hcma_fast.files import write_folder
from hcma_fast.models.weights import load_part
from hcma_fast.program import run_program
from hcma_fast.train.latents import cached_posteriors
from hcma_fast.train.loop import LoopConfig, run
from hcma_fast.train.options import check_batch, recipe_parser
from hcma_fast.train.scenes_cache import rendered_scenes
from hcma_fast.train.vae import psnr, to_tensor


class _Decoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.decoder(self.post_quant_conv(latents))
        return image


def main() -> None:
    args = recipe_parser(__doc__, steps=1000, batch=16, scenes=30000, lr=1e-3).parse_args()
    check_batch(args.batch, args.scenes)

    torch.manual_seed(0)
    vae = load_part(AutoencoderKL, args.out / "vae").eval()
    scenes = rendered_scenes(args.out, "train", args.scenes)
    posteriors = cached_posteriors(args.out, vae, "train", args.scenes)
    validation = rendered_scenes(args.out, "val", 500)[:200]
    model = _Decoder(vae)

    def batch_of_step(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([6, step])
        chosen = np.sort(rng.choice(len(scenes), args.batch, replace=False))
        mean, std = torch.from_numpy(posteriors[chosen]).float().unbind(1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
        return {"latents": mean + std * noise, "images": to_tensor(scenes[chosen])}

    def loss_of_step(step: int) -> dict[str, Tensor]:
        batch = batch_of_step(step)
        output, images = model(batch["latents"]), batch["images"]
        mse, l1 = (output - images).square().mean(), (output - images).abs().mean()
        return {"loss": l1 + 4 * mse, "mse": mse}

    def keep(step: int, averaged: _Decoder) -> None:
        trained = AutoencoderKL.from_config(vae.config)
        trained.load_state_dict({**vae.state_dict(), **averaged.state_dict()})
        trained.eval()
        quality = round(psnr(trained, validation), 2)
        print(json.dumps({"step": step, "val_psnr_db": quality}), flush=True)
        write_folder(args.out / "vae-sharp", trained.save_pretrained)

    config = LoopConfig(steps=args.steps, lr=args.lr, ema_decay=0.995)
    state = args.out / "vae-decoder-state"
    run(model, loss_of_step, config, state, keep, batch_of_step=batch_of_step)


if __name__ == "__main__":
    sys.exit(run_program(main))
