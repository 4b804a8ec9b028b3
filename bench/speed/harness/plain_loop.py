"""The yardstick: grounded generation as one would write it with diffusers and autograd alone.

No engine, no exported graph, no schedule table of ours: diffusers' UNet with GLIGEN's keyword
arguments, torch.autograd through the aligner, PNDMScheduler. Neither tuned nor slowed down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import PNDMScheduler
from PIL import Image
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH, AlignmentSettings
from hcma_fast.layout import Layout
from hcma_fast.losses import local_mean
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.images import pixels_diverged, to_pil, to_unit_range
from hcma_fast.schedule import grounded_steps
from hcma_fast.seeds import seeded_generator


@torch.no_grad()
def plain_generate(
    parts: Components,
    prompts: Sequence[str],
    layouts: Sequence[Layout],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 50,
    settings: AlignmentSettings | None = None,
    unet: Callable[..., Any] | None = None,
    losses: Callable[..., Any] | None = None,
    evaluations: int | None = None,
) -> tuple[list[Image.Image], Tensor]:
    """One image per prompt, layout and seed: images and final latents (B, 4, h, w) float32.

    Args:
        settings: default the checkpoint's own. Guidance is always computed, at 1 as well.
        unet, losses: called in place of ``parts.unet`` and ``parts.own_aligner.losses``.
        evaluations: stop after so many calls of the UNet, and decode nothing: no images then.
    """
    settings = settings or parts.settings
    unet = parts.unet if unet is None else unet
    losses = parts.own_aligner.losses if losses is None else losses
    batch, device = len(prompts), parts.text_encoder.device

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = parts.tokenizer(
            list(texts), padding="max_length", max_length=TOKEN_LENGTH, return_tensors="pt"
        )
        output = parts.text_encoder(input_ids=tokens.input_ids.to(device))
        return output.last_hidden_state, output.pooler_output

    cond, caption = encode(prompts)
    uncond, _ = encode([""] * batch)
    boxes = torch.zeros(batch, MAX_OBJECTS, 4, device=device)
    masks = torch.zeros(batch, MAX_OBJECTS, device=device)
    labels = torch.zeros(batch, MAX_OBJECTS, caption.shape[-1], device=device)
    for i, layout in enumerate(layouts):
        if len(layout):
            boxes[i, : len(layout)] = torch.tensor(layout.boxes)
            masks[i, : len(layout)] = 1
            labels[i, : len(layout)] = encode(layout.phrases)[1]
    gligen = {
        "boxes": torch.cat([boxes, boxes]),
        "positive_embeddings": torch.cat([labels, labels]),
        "masks": torch.cat([torch.zeros_like(masks), masks]),
    }
    regions = parts.own_aligner.region_map(boxes, masks)

    scheduler = pndm_scheduler()
    scheduler.set_timesteps(num_inference_steps)
    side = parts.own_aligner.config.latent_size
    z = draw_noise(seeds, side).to(device)
    for k, t in enumerate(scheduler.timesteps[:evaluations]):
        step = max(k - 1, 0)
        share = step / num_inference_steps
        aligning = settings.eta0 > 0 and settings.window[0] <= share < settings.window[1]
        # PNDMScheduler ignores the sample of its second call, so moving it would do nothing
        if aligning and k != 1:
            eta = settings.eta0 * float((1 - scheduler.alphas_cumprod[t]).sqrt())
            timed = parts.own_aligner.config.time_conditioning != "none"
            time = t.to(device).expand(batch) if timed else None
            gradient = _alignment_gradient(
                losses, z, caption, labels, regions, masks, time, settings
            )
            if settings.normalized:
                norms = [
                    (v.flatten(1).norm(dim=1) + 1e-12).view(-1, 1, 1, 1) for v in (z, gradient)
                ]
                gradient = gradient * norms[0] / norms[1]
            z = z - eta * gradient
        grounded = step < grounded_steps(settings.grounding_beta, num_inference_steps)
        noise = unet(
            torch.cat([z, z]),
            t,
            torch.cat([uncond, cond]),
            cross_attention_kwargs={"gligen": gligen} if grounded else None,
        ).sample
        noise_uncond, noise_cond = noise.chunk(2)
        guided = noise_uncond + settings.guidance_scale * (noise_cond - noise_uncond)
        z = scheduler.step(guided, t, z).prev_sample

    if evaluations is not None:
        return [], z
    images, finite = to_unit_range(parts.vae.decode(z / parts.vae.config.scaling_factor).sample)
    if not bool(finite.all()):
        raise pixels_diverged()
    return to_pil(images), z


def draw_noise(seeds: Sequence[int], side: int) -> Tensor:
    """Unit-normal latents (B, 4, side, side), one per seed."""
    generators = [seeded_generator(seed) for seed in seeds]
    return torch.stack([torch.randn(4, side, side, generator=each) for each in generators])


def pndm_scheduler() -> PNDMScheduler:
    """As Stable Diffusion v1 has it."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _alignment_gradient(
    losses: Callable[..., Any],
    z: Tensor,
    caption: Tensor,
    labels: Tensor,
    regions: Tensor,
    masks: Tensor,
    timesteps: Tensor | None,
    settings: AlignmentSettings,
) -> Tensor:
    """Gradient of both losses, summed over the batch, with respect to the latent (Eq. 8)."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        loss_global, per_box = losses(leaf, caption, labels, regions, masks, timesteps)
        loss_local = local_mean(per_box, masks)
        total = settings.lambda_global * loss_global + settings.lambda_local * loss_local
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
    return gradient
