"""Stage 1 of Algorithm 1: train the aligner from a cache, on one process or many.

Every draw (order, captions, mirroring, noise, timesteps) is a function of the seed and of the
place in the run: epoch, step and micro-batch. So a run that is resumed draws what it would have
drawn, and n processes draw what one does that accumulates n micro-batches. A step takes
``batch = micro_batch x processes x accumulation`` images; its loss is the mean over all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from hcma_fast.errors import UsageError, WeightsError
from hcma_fast.models.aligner import Aligner
from hcma_fast.schedule import TRAIN_STEPS
from hcma_fast.train.aligner_run import AlignerRun, Provenance, RunState
from hcma_fast.train.aligner_settings import FREE, AlignerTraining, check_fits
from hcma_fast.train.cache import Batch, LatentCache
from hcma_fast.train.loop import diverged, ema_update, rate_share
from hcma_fast.train.objective import (
    BUCKETS,
    QUANTITIES,
    AlignerFeatures,
    Noised,
    draw_noised,
    stage1_losses,
    summary,
)

if TYPE_CHECKING:
    from hcma_fast.train.samples import SamplePlan

_VALIDATION_SEED = 2**40
_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, cover [0, 1) evenly however many there are"""


class _Draws(Dataset[Batch]):
    """The micro-batches of one epoch that one process takes, in order."""

    def __init__(
        self,
        cache: LatentCache,
        indices: NDArray[np.int64],
        training: AlignerTraining,
        epoch: int,
        numbers: list[int],
    ) -> None:
        # the same in all processes, and for each image the same wherever it comes in the order
        rng = np.random.default_rng([training.seed, epoch])
        self.order = rng.permutation(indices)
        self.captions, self.flips = rng.random(len(cache)), rng.random(len(cache))
        self.cache, self.size, self.numbers = cache, training.micro_batch, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Batch:
        start = self.numbers[place] * self.size
        chosen = self.order[start : start + self.size]
        return self.cache.batch(chosen, self.captions[chosen], self.flips[chosen])


class _Stage1:
    """One process of a run: model, optimiser, average, and its share of the data."""

    def __init__(
        self,
        cache: LatentCache,
        aligner: Aligner,
        training: AlignerTraining,
        accelerator: Accelerator,
        run: AlignerRun,
    ) -> None:
        self.cache, self.training, self.accelerator = cache, training, accelerator
        self.run = run
        processes = accelerator.num_processes
        per_step = training.micro_batch * processes
        if training.batch % per_step:
            raise UsageError(
                f"the batch must be a multiple of micro-batch x processes ({per_step})",
                value=training.batch,
                remedy="Change --batch or --micro-batch.",
            )
        self.accumulation = training.batch // per_step
        self.micros = training.batch // training.micro_batch
        self.indices = cache.indices_of("train")
        self.held_out = cache.indices_of("val")
        self.steps_per_epoch = len(self.indices) // training.batch
        if not self.steps_per_epoch:
            raise UsageError(
                f"the train part of the cache has {len(self.indices)} images, less than one batch",
                value=training.batch,
                remedy="Lower --batch (and --micro-batch).",
            )
        self.total = self.steps_per_epoch * training.epochs
        if training.max_steps is not None:
            self.total = min(self.total, training.max_steps)
        self.device = accelerator.device
        self.label_table = cache.label_table.to(self.device)
        aligner = aligner.to(self.device).train()
        self.network = AlignerFeatures(aligner)
        self.average = AveragedModel(
            aligner, multi_avg_fn=ema_update(training.ema_decay), use_buffers=True
        )
        kind = torch.optim.AdamW if training.decoupled_decay else torch.optim.Adam
        self.optimizer: torch.optim.Optimizer = kind(
            aligner.parameters(), lr=training.lr, weight_decay=training.weight_decay
        )
        # the optimiser is not prepared: accelerate would only wrap it, as nothing is scaled here
        self.prepared: nn.Module = accelerator.prepare(self.network)
        self.waited = 0.0

    @property
    def averaged(self) -> Aligner:
        """What is validated and exported: the average, or the model itself without one."""
        chosen = self.average.module if self.training.ema_decay else self.network.aligner
        assert isinstance(chosen, Aligner)
        return chosen

    def batches(self, step: int) -> Iterator[tuple[int, Batch]]:
        """Number within its step, and content, of this process's micro-batches from ``step`` on."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for epoch in itertools.count(step // self.steps_per_epoch):
            first = step % self.steps_per_epoch if epoch == step // self.steps_per_epoch else 0
            last = min(self.steps_per_epoch, self.total - epoch * self.steps_per_epoch)
            numbers = [
                s * self.micros + k
                for s in range(first, last)
                for k in range(rank, self.micros, processes)
            ]
            draws = _Draws(self.cache, self.indices, self.training, epoch, numbers)
            # batch_size=None: an item of the data is a micro-batch
            loader = DataLoader(
                draws,
                batch_size=None,
                num_workers=self.training.workers,
                pin_memory=self.device.type == "cuda",
            )
            for number, batch in zip(numbers, loader, strict=True):
                yield number % self.micros, batch

    def step(self, step: int, batches: Iterator[tuple[int, Batch]]) -> Tensor:
        """One step of the optimiser; returns this process's statistics."""
        training = self.training
        share = rate_share(step, training.warmup, self.total if training.cosine else None)
        for group in self.optimizer.param_groups:
            group["lr"] = training.lr * share
        self.optimizer.zero_grad(set_to_none=True)
        statistics = torch.zeros(len(QUANTITIES), 2, BUCKETS, device=self.device)
        for number in range(self.accumulation):
            clock = time.monotonic()
            micro, batch = next(batches)
            batch = batch.to(self.device)
            self.waited += time.monotonic() - clock
            seed = _seed(training.seed, step, micro)
            noised = draw_noised(batch, self.cache.header.scaling_factor, seed)
            last = number == self.accumulation - 1
            # gradients are summed over processes once a step
            with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                losses, found = stage1_losses(
                    self.prepared, noised, self.label_table, bf16=training.bf16
                )
                self._check_finite("loss", losses, step, noised)
                self.accelerator.backward(losses.mean() / self.accumulation)
            statistics += found
        limit = training.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        self._check_finite("gradient norm", norm, step, noised)
        self.optimizer.step()
        if training.ema_decay:
            self.average.update_parameters(self.network.aligner)
        return statistics

    @torch.no_grad()
    def validate(self) -> Tensor:
        """Statistics over the val part: first captions, not mirrored, the same noise each time."""
        network = AlignerFeatures(self.averaged).eval()
        statistics = torch.zeros(len(QUANTITIES), 2, BUCKETS, device=self.device)
        size, count = self.training.micro_batch, len(self.held_out)
        starts = range(0, count, size)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for start in list(starts)[rank::processes]:
            batch = self.cache.batch(self.held_out[start : start + size]).to(self.device)
            places = np.arange(start, min(start + size, count))
            times = torch.from_numpy((places * _GOLDEN % 1 * TRAIN_STEPS).astype(np.int64))
            seed = _seed(_VALIDATION_SEED, start, 0)
            scale = self.cache.header.scaling_factor
            noised = draw_noised(batch, scale, seed, times.to(self.device))
            bf16 = self.training.bf16
            statistics += stage1_losses(network, noised, self.label_table, bf16=bf16)[1]
        self.averaged.train()
        return self.accelerator.reduce(statistics, reduction="sum")  # type: ignore[no-any-return]

    def _check_finite(self, what: str, value: Tensor, step: int, noised: Noised) -> None:
        if bool(torch.isfinite(value.detach()).all()):
            return
        rank = self.accelerator.process_index
        path = self.run.work / f"bad-batch-{step}-{rank}.safetensors"
        tensors = {"z": noised.z, "timesteps": noised.timesteps} | asdict(noised.batch)
        remedy = (
            "Look at the batch, lower --lr or give --clip-norm, and resume from the last state."
        )
        raise diverged(what, value, step, path, tensors, remedy)


def train_aligner(
    cache: Path | LatentCache,
    out: Path,
    training: AlignerTraining,
    aligner: Aligner,
    *,
    cpu: bool = False,
    samples: SamplePlan | None = None,
    progress: Callable[[int, int, dict[str, object] | None], None] = lambda *_: None,
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
    accelerator = Accelerator(cpu=cpu)
    cache = LatentCache(cache) if isinstance(cache, Path) else cache
    check_fits(aligner.config, cache.header, "the aligner")
    provenance = Provenance(
        cache=cache.header.digest,
        vae_sha256=cache.header.vae_sha256,
        text_sha256=cache.header.text_sha256,
        architecture=aligner.config.model_dump(mode="json"),
        training=training.model_dump(mode="json", exclude=FREE),
    )
    run = AlignerRun(out, provenance, main=accelerator.is_main_process, keep=training.keep)
    stage = _Stage1(cache, aligner, training, accelerator, run)
    state = run.resume(stage.network.aligner, stage.optimizer, stage.average)
    # a state of one process must not lead the others elsewhere
    agreed = [state.step]
    broadcast_object_list(agreed)
    if agreed[0] != state.step:
        raise WeightsError(
            f"process {accelerator.process_index} sees another newest state than the first",
            value=str(run.states),
            remedy="All processes need the same --out, on a file system that they share.",
        )
    with run.logging(state.step, tensorboard=training.tensorboard):
        _loop(stage, run, state, samples, progress)
    accelerator.wait_for_everyone()
    return run.best_folder


def _loop(
    stage: _Stage1,
    run: AlignerRun,
    state: RunState,
    samples: SamplePlan | None,
    progress: Callable[[int, int, dict[str, object] | None], None],
) -> None:
    training, accelerator = stage.training, stage.accelerator
    batches = stage.batches(state.step)
    totals = torch.zeros(len(QUANTITIES), 2, BUCKETS, device=stage.device)
    clock, counted, stage.waited = time.monotonic(), 0, 0.0
    for step in range(state.step, stage.total):
        totals += stage.step(step, batches)
        counted += 1
        done = step + 1
        record: dict[str, object] | None = None
        ends_epoch = done % stage.steps_per_epoch == 0 or done == stage.total
        if done % training.log_every == 0 or ends_epoch:
            found = summary(accelerator.reduce(totals, reduction="sum"))
            seconds = time.monotonic() - clock
            record = {
                "step": done,
                "epoch": round(done / stage.steps_per_epoch, 3),
                **found,
                "lr": stage.optimizer.param_groups[0]["lr"],
                "samples_per_second": round(counted * training.batch / seconds, 2),
                "data_wait_share": round(stage.waited / seconds, 4),
            }
            run.log("train", record)
            totals.zero_()
            clock, counted, stage.waited = time.monotonic(), 0, 0.0
        if ends_epoch:
            found = summary(stage.validate())
            run.log("val", {"step": done, **found})
            loss = found["loss"]
            assert isinstance(loss, float)
            if state.best_loss is None or loss < state.best_loss:
                state.best_loss, state.best_step = loss, done
                run.export_best(stage.averaged, done, found)
        if samples is not None and samples.due(done):
            begun = time.monotonic()
            run.draw(samples, done, stage.averaged)
            clock += time.monotonic() - begun
        if ends_epoch or done % training.checkpoint_every == 0:
            state.step = done
            run.save(state, stage.network.aligner, stage.optimizer, stage.average)
        if ends_epoch:
            # validation is not the loop's; its time is not counted, and the log has just started
            clock = time.monotonic()
        if accelerator.is_main_process:
            progress(done, stage.total, record)
    if state.step == stage.total and stage.total:
        run.export_last(stage.averaged, stage.total)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
