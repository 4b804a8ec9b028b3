"""The suite of training: stage 1 of the aligner, with a cache and without."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hcma_fast.bench.shared.machine import lacks_bfloat16
from hcma_fast.bench.shared.rates import matmul_rate
from hcma_fast.bench.speed.harness.contestants import SD14, components_of
from hcma_fast.bench.speed.harness.plan import Plan
from hcma_fast.bench.speed.harness.rounds import Case, Group
from hcma_fast.bench.speed.harness.workers import Contestant
from hcma_fast.files import make_folder, write_whole
from hcma_fast.train.aligner.objective import AlignerFeatures, draw_noised, stage1_losses
from hcma_fast.train.data.encoders import Encoders
from hcma_fast.train.data.image_files import open_image_file
from hcma_fast.train.data.latent_cache import (
    HEADER_FILE,
    LABELS_FILE,
    Batch,
    CacheHeader,
    CacheNotes,
    LatentCache,
    pack,
    shard_file,
)
from hcma_fast.train.data.views import crop_image

if TYPE_CHECKING:
    from hcma_fast.models.checkpoint.folder import Components

_FILES = 32
"""Images on the disk that a loop without a cache reads in turns"""
_CAPTIONS = ("a dog to the left of a pizza", "two cups on a table", "a red bus on a street")


def train(plan: Plan) -> list[Group]:
    """Stage 1 of the aligner; an image is a sample. Without a cache, each step reads its image
    files and runs the VAE's encoder and the text encoder."""
    full = plan.model == SD14
    steps, batch = (2, 8) if plan.quick else (10, 16 if full else 64)
    kinds = (
        ("float32, cached", False, True, steps),
        ("bfloat16 autocast, cached", True, True, steps),
        # an image of 512 pixels takes the encoder seconds
        ("float32, no cache", False, False, 1 if full else steps),
    )
    cases = [
        Case(
            name,
            partial(load_training, plan.model, some, batch, bf16, plan.device, cached=cached),
            {"batch": batch, "steps": some},
            some * batch,
            max_error=None,
            warm_up=cached or not full,
        )
        for name, bf16, cached, some in kinds
    ]
    slow = None if plan.on_gpu else lacks_bfloat16()
    left_out = {case.name: slow for case in cases if "bfloat16" in case.name and slow}
    cases = [case for case in cases if case.name not in left_out]
    return [Group("aligner training", cases, left_out)]


class Uncached(LatentCache):
    """A loop without a cache, with the interface of one: boxes from it, the rest made anew."""

    def __init__(
        self, folder: Path, encoders: Encoders, files: Sequence[Path], captions: Sequence[str]
    ) -> None:
        super().__init__(folder)
        self.encoders, self.files, self.texts = encoders, files, captions

    def batch(
        self,
        indices: NDArray[np.int64],
        caption_draws: NDArray[np.float64] | None = None,
        flip_draws: NDArray[np.float64] | None = None,
    ) -> Batch:
        """As the cache's, from image files and texts."""
        found = super().batch(indices, caption_draws, flip_draws)
        crops = []
        for index in indices:
            opened = open_image_file(self.files[index % len(self.files)], "an image")
            crop = crop_image(opened.image, self.encoders.image_size)
            crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
        latents = self.encoders.posterior(torch.stack(crops))
        texts = [self.texts[index % len(self.texts)] for index in indices]
        return replace(
            found,
            mean=latents[:, 0],
            std=latents[:, 1],
            caption=self.encoders.embed(texts)[0],
        )


def load_training(
    model: str, steps: int, batch: int, bf16: bool, device: str, *, cached: bool = True
) -> Contestant:
    """Some steps of ``train.aligner.train.train_aligner``, with its checkpoint at the end.

    Figures are of the training loop alone, without validation and checkpoint, medians of all runs
    but the first: samples per second, share of the time that it waited for data, and, with a cache,
    operations per second and the share that these are of a large matrix product's rate, in the same
    precision, measured after each run. Without one, encoders run that are not counted.

    Raises:
        WeightsError: no such model.
    """
    from hcma_fast.train.aligner.settings import AlignerTraining
    from hcma_fast.train.aligner.train import train_aligner

    parts = components_of(model, drawn=("aligner", *(() if cached else ("text", "vae"))))
    training = AlignerTraining(
        batch=batch,
        micro_batch=batch,
        max_steps=steps,
        log_every=steps,
        bf16=bf16,
        tensorboard=False,
    )
    folder = tempfile.TemporaryDirectory()  # gone with this process at the latest
    place = Path(folder.name) / "cache"
    # of which 80% are trained on: one epoch is enough
    write_random_cache(place, parts, 16 + steps * batch * 3 // 2)
    cache = LatentCache(place)
    if not cached:
        encoders = Encoders(
            parts.tokenizer,
            parts.text_encoder,
            parts.vae,
            preset=parts.preset,
            image_size=parts.image_size,
            device=torch.device(device),
        )
        cache = Uncached(place, encoders, write_images(place, parts.image_size), _CAPTIONS)
    for parameter in parts.own_aligner.parameters():
        parameter.requires_grad_()
    flops = training_flops(parts, cache) if cached else 0.0
    rates: list[float] = []
    waits: list[float] = []
    peaks: list[float] = []

    def progress(done: int, total: int, record: dict[str, object] | None) -> None:
        if record is not None:
            rate, waited = record["samples_per_second"], record["data_wait_share"]
            assert isinstance(rate, float) and isinstance(waited, float)
            rates.append(rate)
            waits.append(waited)

    def generate() -> NDArray[np.float32]:
        with tempfile.TemporaryDirectory(dir=folder.name) as out:
            train_aligner(
                cache,
                Path(out),
                training,
                parts.own_aligner,
                cpu=device == "cpu",
                progress=progress,
            )
        return np.zeros(1, np.float32)

    def tell() -> dict[str, float]:
        samples, waited = (float(np.median(found[1:] or found)) for found in (rates, waits))
        figures = {"loop_samples_per_second": samples, "data_wait_share": waited}
        if not cached:
            return figures
        peaks.append(matmul_rate(torch.bfloat16 if bf16 else torch.float32, device))
        rate, peak = samples * flops, float(np.median(peaks[1:] or peaks))
        gflops = {"gflops": rate / 1e9, "matmul_gflops": peak / 1e9}
        return {**figures, **gflops, "share_of_matmul": rate / peak}

    return Contestant(generate, parts.preset, parts.weights_hash, device, figures=tell)


def training_flops(parts: Components, cache: LatentCache) -> float:
    """Operations of matrix products for one sample, forward and backward, counted on the aligner.

    Attention counts as its products; its softmax, norms and the optimiser count as nothing.
    """
    network = AlignerFeatures(parts.own_aligner)
    noised = draw_noised(cache.batch(np.arange(2)), cache.header.scaling_factor, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses, _ = stage1_losses(network, noised, cache.label_table)
        losses.mean().backward()
    parts.own_aligner.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / 2


def write_images(folder: Path, side: int) -> list[Path]:
    """JPEG files of 5/4 the width and 15/16 the height of ``side``, as COCO's 640 x 480 to 512."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(_FILES):
        coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side * 5 // 4, side * 15 // 16))
        path = folder / f"image-{number}.jpg"
        image.save(path, quality=90)
        files.append(path)
    return files


def write_random_cache(folder: Path, parts: Components, count: int) -> None:
    """A cache as ``hcma-fast train cache`` writes it, of noise: ``count`` images with one view, one
    caption and two boxes each."""
    make_folder(folder)
    config = parts.own_aligner.config
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    header = CacheHeader(
        preset=parts.preset,
        vae_sha256="0" * 64,
        text_sha256="0" * 64,
        annotations_sha256="0" * 64,
        split="noise",
        image_count=count,
        image_size=parts.image_size,
        min_area=0.0,
        views=1,
        latent_shape=shape,
        scaling_factor=float(parts.vae.config.scaling_factor),
        text_width=config.text_width,
        labels=("a", "b"),
        shard_size=count,
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "image_ids": torch.arange(count),
        "latents": torch.randn(count, 1, 2, *shape, generator=generator).half(),
        "caption_starts": torch.arange(count + 1),
        "captions": torch.randn(count, config.text_width, generator=generator),
        "caption_flips": torch.zeros(count, dtype=torch.bool),
        "box_starts": 2 * torch.arange(count + 1),
        "boxes": torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.5, 0.9, 0.9]]).repeat(count, 1),
        "labels": torch.tensor([0, 1]).repeat(count),
    }
    notes = CacheNotes(header=header.digest)
    table = {"labels": torch.randn(2, config.text_width, generator=generator)}
    for name, content in (
        (LABELS_FILE, pack(table, notes)),
        (shard_file(0), pack(tensors, notes)),
        (HEADER_FILE, header.model_dump_json().encode()),
    ):
        write_whole(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
