"""The loop that all stages of Algorithm 1 share, on one process or many.

A stage says what is trained and by which loss (:class:`Objective`); the rest is here. Every draw
(order, captions, mirroring, noise, timesteps) is a function of the seed and of the place in the
run: epoch, step and micro-batch. So a run that is resumed draws what it would have drawn, and n
processes draw what one does that accumulates n micro-batches. A step takes
``batch = micro_batch x processes x accumulation`` images; its loss is the mean over all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from hcma_fast.errors import UsageError, WeightsError
from hcma_fast.schedule import TRAIN_STEPS
from hcma_fast.train.aligner.objective import Noised
from hcma_fast.train.data.latent_cache import Batch, LatentCache
from hcma_fast.train.loop.loop import diverged, ema_update, rate_share
from hcma_fast.train.loop.run_folder import RunFolder, RunState
from hcma_fast.train.loop.settings import Training

if TYPE_CHECKING:
    from hcma_fast.train.loop.samples import SamplePlan

_VALIDATION_SEED = 2**40
_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, cover [0, 1) evenly however many there are"""

Report: TypeAlias = Callable[[int, int, dict[str, object] | None], None]
"""Takes steps done, steps in all, and the record where one was logged"""
Drawn = TypeVar("Drawn", bound=Noised)


def make_accelerator(*, cpu: bool) -> Accelerator:
    """This process's part in a run, as ``accelerate launch`` or ``torchrun`` started it.

    A mixed precision in the user's configuration of accelerate is not followed: it would cast the
    forward, and scale gradients that nothing here unscales. ``bf16`` of the settings decides.
    """
    return Accelerator(cpu=cpu, mixed_precision="no")


class Objective(Protocol[Drawn]):
    """What a stage trains, and by which loss; its modules are on their device."""

    @property
    def network(self) -> nn.Module:
        """A module whose one forward the losses need: DDP wants it so."""

    @property
    def trained(self) -> nn.Module:
        """The part of the network whose weights move; it is averaged and saved."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the statistics."""

    def draw(self, batch: Batch, seed: int, timesteps: Tensor | None = None) -> Drawn:
        """All that is random, from ``seed``; ``timesteps`` (B,) are given in validation."""

    def losses(self, network: nn.Module, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Loss of each image (B,), and statistics to add up.

        Args:
            network: :attr:`network`, or DDP around it.
        """

    def summary(self, statistics: Tensor) -> dict[str, Any]:
        """What the logs say of summed statistics; ``loss`` chooses the best."""

    def export(self, folder: Path) -> None:
        """Write the network as it is to ``folder``, each file whole or not at all."""

    def parts(self) -> Mapping[str, nn.Module]:
        """What samples are drawn with, by its name in :meth:`SamplePlan.draw`."""


class _Draws(Dataset[Batch]):
    """The micro-batches of one epoch that one process takes, in order."""

    def __init__(
        self,
        cache: LatentCache,
        indices: NDArray[np.int64],
        training: Training,
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


class Stage(Generic[Drawn]):
    """One process of a run: objective, optimiser, average, and its share of the data.

    Args:
        work: folder for the batch of a loss that is not finite.

    Raises:
        InputError: a part of the cache is empty.
        UsageError: the batch does not divide, or is larger than the data.
    """

    def __init__(
        self,
        cache: LatentCache,
        objective: Objective[Drawn],
        training: Training,
        accelerator: Accelerator,
        work: Path,
    ) -> None:
        self.cache, self.training, self.accelerator = cache, training, accelerator
        self.objective, self.work = objective, work
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
        self.average: AveragedModel | None = None
        if training.ema_decay:
            self.average = AveragedModel(
                objective.trained, multi_avg_fn=ema_update(training.ema_decay), use_buffers=True
            )
        kind = torch.optim.AdamW if training.decoupled_decay else torch.optim.Adam
        self.optimizer: torch.optim.Optimizer = kind(
            objective.trained.parameters(), lr=training.lr, weight_decay=training.weight_decay
        )
        objective.network.train()
        # the optimiser is not prepared: accelerate would only wrap it, as nothing is scaled here
        self.prepared: nn.Module = accelerator.prepare(objective.network)
        self.waited = 0.0

    def statistics(self) -> Tensor:
        """Nothing counted yet."""
        return torch.zeros(self.objective.shape, device=self.device)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the averaged weights are in the place of the trained ones, if there are any."""
        if self.average is None:
            yield
            return
        _exchange(self.objective.trained, self.average.module)
        try:
            yield
        finally:
            _exchange(self.objective.trained, self.average.module)

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
        statistics = self.statistics()
        for number in range(self.accumulation):
            clock = time.monotonic()
            micro, batch = next(batches)
            batch = batch.to(self.device)
            self.waited += time.monotonic() - clock
            drawn = self.objective.draw(batch, _seed(training.seed, step, micro))
            last = number == self.accumulation - 1
            # gradients are summed over processes once a step
            with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                losses, found = self.objective.losses(self.prepared, drawn)
                self._check_finite("loss", losses, step, drawn)
                # not accelerate's, which divides by the user's configuration once more
                (losses.mean() / self.accumulation).backward()
            statistics += found
        limit = training.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.objective.trained.parameters(), limit)
        self._check_finite("gradient norm", norm, step, drawn)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.objective.trained)
        return statistics

    @torch.no_grad()
    def validate(self, step: int) -> Tensor:
        """Statistics over the val part: first captions, not mirrored, the same noise each time.

        Args:
            step: after which, for the error.

        Raises:
            DivergenceError: a loss is not finite; its batch was saved.
        """
        network = self.objective.network.eval()
        statistics = self.statistics()
        size, count = self.training.micro_batch, len(self.held_out)
        starts = range(0, count, size)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for start in list(starts)[rank::processes]:
            batch = self.cache.batch(self.held_out[start : start + size]).to(self.device)
            places = np.arange(start, min(start + size, count))
            times = torch.from_numpy((places * _GOLDEN % 1 * TRAIN_STEPS).astype(np.int64))
            seed = _seed(_VALIDATION_SEED, start, 0)
            drawn = self.objective.draw(batch, seed, times.to(self.device))
            losses, found = self.objective.losses(network, drawn)
            # as the best of all it would stay for ever: nothing is less than NaN
            self._check_finite("validation loss", losses, step, drawn)
            statistics += found
        network.train()
        return self.accelerator.reduce(statistics, reduction="sum")  # type: ignore[no-any-return]

    def _check_finite(self, what: str, value: Tensor, step: int, drawn: Drawn) -> None:
        if bool(torch.isfinite(value.detach()).all()):
            return
        rank = self.accelerator.process_index
        path = self.work / f"bad-batch-{step}-{rank}.safetensors"
        tensors = {"z": drawn.z, "timesteps": drawn.timesteps} | asdict(drawn.batch)
        remedy = (
            "Look at the batch, lower --lr or give --clip-norm, and resume from the last state."
        )
        raise diverged(what, value, step, path, tensors, remedy)


def train_stage(
    stage: Stage[Drawn], run: RunFolder, samples: SamplePlan | None, progress: Report
) -> Path:
    """Train from the newest state in ``run`` to the end; returns the best export's folder.

    Args:
        samples: pictures to draw along the way; they leave the weights as they are.
        progress: called in the main process.

    Raises:
        WeightsError: the newest state is damaged or another run's, or processes see other ones.
        UsageError: TensorBoard is asked for and not installed.
        DivergenceError: loss or gradient is not finite; the batch was saved.
        OutputError: the folder cannot be written, or the disk is full.
    """
    accelerator = stage.accelerator
    state = run.resume(stage.objective.trained, stage.optimizer, stage.average)
    # a state of one process must not lead the others elsewhere
    agreed = [state.step]
    broadcast_object_list(agreed)
    if agreed[0] != state.step:
        raise WeightsError(
            f"process {accelerator.process_index} sees another newest state than the first",
            value=str(run.states),
            remedy="All processes need the same --out, on a file system that they share.",
        )
    with run.logging(state.step, tensorboard=stage.training.tensorboard):
        _loop(stage, run, state, samples, progress)
    accelerator.wait_for_everyone()
    return run.best_folder


def _loop(
    stage: Stage[Drawn],
    run: RunFolder,
    state: RunState,
    samples: SamplePlan | None,
    progress: Report,
) -> None:
    training, accelerator, objective = stage.training, stage.accelerator, stage.objective
    batches = stage.batches(state.step)
    totals = stage.statistics()
    clock, counted, stage.waited = time.monotonic(), 0, 0.0
    for step in range(state.step, stage.total):
        totals += stage.step(step, batches)
        counted += 1
        done = step + 1
        record: dict[str, object] | None = None
        ends_epoch = done % stage.steps_per_epoch == 0 or done == stage.total
        if done % training.log_every == 0 or ends_epoch:
            found = objective.summary(accelerator.reduce(totals, reduction="sum"))
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
            with stage.averaged():
                found = objective.summary(stage.validate(done))
                run.log("val", {"step": done, **found})
                loss = found["loss"]
                assert isinstance(loss, float)
                if state.best_loss is None or loss < state.best_loss:
                    state.best_loss, state.best_step = loss, done
                    run.export(run.best_folder, objective.export, done, found)
        if samples is not None and samples.due(done):
            begun = time.monotonic()
            with stage.averaged():
                run.draw(samples, done, objective.parts())
            clock += time.monotonic() - begun
        if ends_epoch or done % training.checkpoint_every == 0:
            state.step = done
            run.save(state, objective.trained, stage.optimizer, stage.average)
        if ends_epoch:
            # validation is not the loop's; its time is not counted, and the log has just started
            clock = time.monotonic()
        if accelerator.is_main_process:
            progress(done, stage.total, record)
    if state.step == stage.total and stage.total:
        with stage.averaged():
            run.export(run.last_folder, objective.export, stage.total, {})


def _exchange(first: nn.Module, second: nn.Module) -> None:
    """Exchange the values of two modules of one shape, without copies."""
    ours = itertools.chain(first.parameters(), first.buffers())
    theirs = itertools.chain(second.parameters(), second.buffers())
    for a, b in zip(ours, theirs, strict=True):
        a.data, b.data = b.data, a.data


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
