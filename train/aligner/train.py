"""Stage 1 of Algorithm 1: train the aligner from a cache, on one process or many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hcma_fast.models.aligner import Aligner
from hcma_fast.train.aligner.objective import (
    BUCKETS,
    QUANTITIES,
    AlignerFeatures,
    Noised,
    draw_noised,
    stage1_losses,
    summary,
)
from hcma_fast.train.aligner.settings import AlignerTraining, check_fits
from hcma_fast.train.data.latent_cache import Batch, LatentCache
from hcma_fast.train.loop.run_folder import Provenance, RunFolder
from hcma_fast.train.loop.settings import FREE
from hcma_fast.train.loop.stage import Report, Stage, make_accelerator, train_stage

if TYPE_CHECKING:
    from hcma_fast.train.loop.samples import SamplePlan


#: of the config, what training adds to the architecture
_BASE = {"vae_sha256", "text_sha256"}


class _Objective:
    """Both losses on noised latents; see :class:`hcma_fast.train.loop.stage.Objective`."""

    shape = (len(QUANTITIES), 2, BUCKETS)

    def __init__(
        self, aligner: Aligner, cache: LatentCache, device: torch.device, *, bf16: bool
    ) -> None:
        self.trained = aligner.to(device)
        self.network = AlignerFeatures(self.trained)
        self.label_table = cache.label_table.to(device)
        self.scale, self.bf16 = cache.header.scaling_factor, bf16

    def draw(self, batch: Batch, seed: int, timesteps: Tensor | None = None) -> Noised:
        return draw_noised(batch, self.scale, seed, timesteps)

    def losses(self, network: nn.Module, drawn: Noised) -> tuple[Tensor, Tensor]:
        return stage1_losses(network, drawn, self.label_table, bf16=self.bf16)

    def summary(self, statistics: Tensor) -> dict[str, Any]:
        return summary(statistics)

    def export(self, folder: Path) -> None:
        self.trained.save_pretrained(folder)

    def parts(self) -> Mapping[str, nn.Module]:
        return {"aligner": self.trained}


def train_aligner(
    cache: Path | LatentCache,
    out: Path,
    training: AlignerTraining,
    aligner: Aligner,
    *,
    cpu: bool = False,
    samples: SamplePlan | None = None,
    progress: Report = lambda *_: None,
) -> Path:
    """Train ``aligner`` in place from the newest state in ``out``; returns the best one's folder.

    Starts under ``accelerate launch`` or ``torchrun`` as one of their processes.

    Args:
        cache: its folder, or the open cache.
        aligner: the start, in the same state in all processes; a newer state in ``out`` wins.
        samples: pictures to draw along the way; they leave the weights as they are.
        progress: called in the main process with steps done, steps in all, and the record where
            one was logged.

    Raises:
        InputError: the cache is unfinished, damaged, or has no image in a part.
        WeightsError: the aligner or the state does not fit the cache or these settings.
        UsageError: the batch does not divide, or is larger than the data.
        DivergenceError: loss or gradient is not finite; the batch was saved.
        OutputError: ``out`` cannot be written, or the disk is full.
    """
    accelerator = make_accelerator(cpu=cpu)
    cache = LatentCache(cache) if isinstance(cache, Path) else cache
    check_fits(aligner.config, cache.header, "the aligner")
    provenance = Provenance(
        cache=cache.header.digest,
        vae_sha256=cache.header.vae_sha256,
        text_sha256=cache.header.text_sha256,
        architecture=aligner.config.model_dump(mode="json", exclude=_BASE),
        training=training.model_dump(mode="json", exclude=FREE),
    )
    main = accelerator.is_main_process
    run = RunFolder(out, "aligner", provenance, main=main, keep=training.keep)
    base = {"vae_sha256": provenance.vae_sha256, "text_sha256": provenance.text_sha256}
    aligner.config = aligner.config.model_copy(update=base)
    objective = _Objective(aligner, cache, accelerator.device, bf16=training.bf16)
    stage = Stage(cache, objective, training, accelerator, run.work)
    return train_stage(stage, run, samples, progress)
