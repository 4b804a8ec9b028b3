"""Train the gated UNet of `tiny`: ``python -m hcma_fast.train.tiny.unet --out .runs/tiny``.

Noise prediction (Eq. 1) with min-SNR weights (gamma 5). Some steps run without the gated layers,
since `unet_plain` must denoise too; caption and grounding are dropped at times for guidance. With
``--aligned-share`` that share of the examples is aligned first, by the aligner that is already
trained: stage 2 of Algorithm 1, for the whole UNet instead of GLIGEN's layers alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel

from hcma_fast.config import AlignmentSettings
from hcma_fast.files import write_folder
from hcma_fast.models.aligner import Aligner, AlignStep
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer
from hcma_fast.program import run_program
from hcma_fast.schedule import add_noise, alphas_cumprod
from hcma_fast.seeds import seeded_generator
from hcma_fast.train.aligner.settings import architecture
from hcma_fast.train.data.editions import EDITIONS
from hcma_fast.train.data.emoji_scenes import FIRST, Edition
from hcma_fast.train.data.scenes_cache import check_batch
from hcma_fast.train.denoiser.alignment import align_rows
from hcma_fast.train.loop.loop import LoopConfig, check_can_go_on, run
from hcma_fast.train.loop.samples import plan_scene_samples
from hcma_fast.train.tiny.grounding_attention import GroundingAttention
from hcma_fast.train.tiny.latents import Batch, SceneLatents
from hcma_fast.train.tiny.text import WIDTH

PLAIN_SHARE = 0.05
#: shares of the examples that lose caption and grounding (the unconditional half of guidance),
#: the caption alone, the grounding alone
DROP_BOTH, DROP_CAPTION, DROP_GROUNDING = 0.08, 0.35, 0.05
SNR_GAMMA = 5.0
ATTENTION_WEIGHT = 0.02
MAX_ETA0 = 60.0
"""Rates of alignment in training are uniform up to it: twice what sampling uses"""


def make_unet(edition: Edition = FIRST) -> UNet2DConditionModel:
    """The architecture of `tiny`'s UNet: 5.5 M parameters with attention at 8 x 8 only for the
    first edition, 6.1 M with attention at 16 x 16 too for the second."""
    outer = ("DownBlock2D", "UpBlock2D")
    if edition is not FIRST:
        outer = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=(outer[0], "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", outer[1]),
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


def align_some(
    align: AlignStep,
    z: Tensor,
    batch: Batch,
    timesteps: Tensor,
    aligned: NDArray[np.bool_],
    seed: int,
) -> Tensor:
    """z (B, C, h, w) with the rows of ``aligned`` (B,) moved, each at a rate of its own."""
    rows = torch.from_numpy(aligned.nonzero()[0])
    shares = torch.rand(len(rows), generator=seeded_generator(seed))
    eta0 = MAX_ETA0 * shares
    return align_rows(align, z, batch, timesteps, rows, eta0, torch.ones(len(rows), 2))


def scene_components(
    folder: Path, unet: UNet2DConditionModel, edition: Edition = FIRST
) -> Components:
    """The parts of a run of `tiny` so far; without a trained aligner, an alignment of rate 0."""
    trained = (folder / "aligner").is_dir()
    return Components(
        preset="tiny",
        tokenizer=load_tokenizer(folder / "tokenizer"),
        text_encoder=load_part(CLIPTextModel, folder / "text_encoder").eval(),
        unet=unet,
        vae=load_part(AutoencoderKL, folder / "vae").eval(),
        aligner=(
            Aligner.from_pretrained(folder / "aligner")
            if trained
            else Aligner(architecture("tiny"))
        ),
        settings=AlignmentSettings(eta0=1.0 if trained else 0.0, guidance_scale=3.0),
        image_size=edition.image_size,
        weights_hash="in training",
        source=None,
    )


@contextmanager
def sampling(
    folder: Path,
    unet: UNet2DConditionModel,
    every: int,
    state: Path,
    edition: Edition = FIRST,
) -> Iterator[Callable[[int, UNet2DConditionModel], None] | None]:
    """What draws samples into ``state`` where they are due; None for ``every`` 0."""
    if not every:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    plan = plan_scene_samples(scene_components(folder, unet, edition), every, edition=edition)
    with SummaryWriter(state / "tensorboard") as events:

        def sample(step: int, averaged: UNet2DConditionModel) -> None:
            if plan.due(step):
                plan.draw(state / "samples", step, unet=averaged, events=events)

        yield sample


def _positive(text: str) -> int:
    """A whole number above 0; argparse makes a usage error of the ValueError."""
    value = int(text)
    if value <= 0:
        raise ValueError(text)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the gated UNet of tiny on EmojiScenes. What was stopped goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, kind, default, told in (
        ("--out", Path, Path(".runs/tiny"), "folder of all of tiny's parts, the VAE's included"),
        ("--steps", _positive, 8000, "steps in all"),
        ("--batch", _positive, 16, "scenes a step"),
        ("--scenes", _positive, 30000, "scenes to draw"),
        ("--lr", float, 1e-3, "learning rate"),
        ("--aligned-share", float, 0.0, "share of the examples that the aligner in --out aligns"),
        ("--sample-every", int, 0, "draw some val layouts every so many steps; 0 for never"),
    ):
        parser.add_argument(name, type=kind, default=default, help=told)
    parser.add_argument(
        "--edition",
        type=int,
        choices=sorted(EDITIONS),
        default=1,
        help="of EmojiScenes: 1 has 64 pixels, 2 has 128",
    )
    args = parser.parse_args()
    check_batch(args.batch, args.scenes)
    edition = EDITIONS[args.edition]
    state = args.out / "denoiser-state"
    draws: dict[str, int | float] = {
        "batch": args.batch,
        "scenes": args.scenes,
        "aligned_share": args.aligned_share,
    }
    config = LoopConfig(
        steps=args.steps,
        lr=args.lr,
        warmup=200,
        weight_decay=0.01,
        ema_decay=0.9995,
        checkpoint_every=400,
        draws=draws if edition is FIRST else draws | {"edition": edition.number},
    )
    check_can_go_on(state, config)

    torch.manual_seed(0)
    data = SceneLatents(args.out, "train", args.scenes, edition)
    # convolutions of these widths run 8% faster so
    model = make_unet(edition).to(memory_format=torch.channels_last)
    align = AlignStep(Aligner.from_pretrained(args.out / "aligner")) if args.aligned_share else None
    attention = GroundingAttention(model)
    alphas = alphas_cumprod().float()
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=SNR_GAMMA) / snr

    def batch_of_step(step: int) -> dict[str, Tensor]:
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
        z = add_noise(batch.z0, noise, timesteps)
        if align is not None:
            aligned = rng.random(args.batch) < args.aligned_share
            z = align_some(align, z, batch, timesteps, aligned, step + 30_000_000)
        mask = batch.mask * torch.from_numpy(~without_boxes).unsqueeze(-1)
        return {
            "z": z,
            "noise": noise,
            "timesteps": timesteps,
            "hidden": batch.hidden,
            "boxes": batch.boxes,
            "labels": batch.labels,
            "mask": mask.float(),
            "plain": torch.tensor(rng.random() < PLAIN_SHARE),
        }

    def loss_of_step(step: int) -> dict[str, Tensor]:
        batch = batch_of_step(step)
        boxes, mask, timesteps = batch["boxes"], batch["mask"], batch["timesteps"]
        gligen = {"boxes": boxes, "positive_embeddings": batch["labels"], "masks": mask}
        predicted = model(
            batch["z"],
            timesteps,
            batch["hidden"],
            cross_attention_kwargs=None if batch["plain"] else {"gligen": gligen},
        ).sample
        error = (predicted - batch["noise"]).square().mean(dim=(1, 2, 3))
        where = attention.loss(boxes, mask)
        loss = (error * weights[timesteps]).mean() + ATTENTION_WEIGHT * where
        return {"loss": loss, "mse": error.mean(), "attention": where}

    def keep(step: int, averaged: UNet2DConditionModel) -> None:
        write_folder(args.out / "unet", averaged.save_pretrained)

    with sampling(args.out, model, args.sample_every, state, edition) as sample:
        run(model, loss_of_step, config, state, keep, sample, batch_of_step)


if __name__ == "__main__":
    sys.exit(run_program(main))
