"""One resumable training loop for all stages.

A stage gives a module, and a loss as a function of the step number. Batches and noise are drawn
from the step number too, so that a run killed at any time and resumed sees the same data as one
that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from hcma_fast.errors import HcmaError
from hcma_fast.files import append_line, make_folder
from hcma_fast.train.loop.states import check_begun, load_state, save_state, write_tensors

Record = dict[str, float]
"""what is logged of a step: its number and named figures"""
_Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]
_Model = TypeVar("_Model", bound=nn.Module)


class DivergenceError(HcmaError):
    """Training reached a loss or a gradient that is not finite (exit code 1)."""


class LoopConfig(BaseModel):
    """How long and how fast: ``lr`` is the peak of a linear warm-up and cosine decay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    draws: dict[str, int | float] = {}
    """what else the batches follow from, such as their size"""
    log_every: int = 50
    checkpoint_every: int = 200

    def course(self) -> dict[str, float]:
        """What a run goes on with as it was begun. Its length is free, to make a run longer: from
        there on the rate is that of the longer one."""
        rest = self.model_dump(exclude={"steps", "draws", "log_every", "checkpoint_every"})
        return self.draws | rest


def check_can_go_on(folder: Path, config: LoopConfig) -> None:
    """What :func:`run` asks of the state in ``folder`` first; for those who draw data before.

    Raises:
        WeightsError: the state cannot be resumed, or was begun with other settings.
    """
    check_begun(folder / "state.pt", config.course())


def print_record(record: Record) -> None:
    """A line of JSON on stdout."""
    print(json.dumps(record), flush=True)


def learning_rate(config: LoopConfig, step: int) -> float:
    """Learning rate of ``step``: linear warm-up, then cosine to 2% of the peak."""
    return config.lr * rate_share(step, config.warmup, config.steps)


def rate_share(step: int, warmup: int, steps: int | None) -> float:
    """Share of the peak learning rate: linear up to step ``warmup``, then cosine down to 2% at
    ``steps``, or 1 without ``steps``."""
    if step < warmup:
        return (step + 1) / warmup
    if steps is None:
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def run(
    model: _Model,
    loss_of_step: Callable[[int], dict[str, Tensor]],
    config: LoopConfig,
    folder: Path,
    on_checkpoint: Callable[[int, _Model], None] | None = None,
    on_step: Callable[[int, _Model], None] | None = None,
    batch_of_step: Callable[[int], Mapping[str, Tensor]] | None = None,
    on_log: Callable[[Record], None] = print_record,
) -> _Model:
    """Train ``model`` in place from the newest state in ``folder``; returns the averaged copy.

    Args:
        loss_of_step: step -> named scalar losses; ``"loss"`` is minimised, the rest is logged.
        on_checkpoint: called with the step and the averaged model before each checkpoint.
        on_step: called with both after each step; its time is not counted in the log.
        batch_of_step: draws again what the losses of a step are computed from, to be kept for
            inspection where one of them is not finite.
        on_log: called with the step to begin at and the number of steps, then with each record
            that goes into log.jsonl.

    Raises:
        DivergenceError: a loss or gradient is not finite; the last state stays as it was, and the
            batch was saved where ``batch_of_step`` is given.
        WeightsError: the state in ``folder`` cannot be resumed, or was begun with other settings.
        OutputError: ``folder`` cannot be written, or the disk is full.
    """
    make_folder(folder)
    check_can_go_on(folder, config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=ema_update(config.ema_decay), use_buffers=True
    )
    start = load_state(folder / "state.pt", model, optimizer, ema)
    on_log({"step": start, "steps": config.steps})
    model.train()
    totals: dict[str, float] = {}
    count = 0
    clock = time.monotonic()
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        losses = loss_of_step(step)
        _check_finite("loss", losses["loss"], step, folder, batch_of_step)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        _check_finite("gradient norm", norm, step, folder, batch_of_step)
        optimizer.step()
        ema.update_parameters(model)
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach())
        count += 1
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            seconds = time.monotonic() - clock
            record = {
                "step": done,
                **{name: round(total / count, 5) for name, total in totals.items()},
                "lr": learning_rate(config, step),
                "steps_per_second": round(count / seconds, 3),
            }
            append_line(folder / "log.jsonl", json.dumps(record))
            on_log(record)
            totals, count, clock = {}, 0, time.monotonic()
        if on_step is not None:
            begun = time.monotonic()
            on_step(done, cast(_Model, ema.module))
            clock += time.monotonic() - begun
        if done % config.checkpoint_every == 0 or done == config.steps:
            # the export first: a run killed in between then repeats it, instead of missing it
            if on_checkpoint is not None:
                on_checkpoint(done, cast(_Model, ema.module))
                model.train()
            save_state(folder / "state.pt", model, optimizer, ema, done, config.course())
    return cast(_Model, ema.module)


def _check_finite(
    what: str,
    value: Tensor,
    step: int,
    folder: Path,
    batch_of_step: Callable[[int], Mapping[str, Tensor]] | None,
) -> None:
    if bool(torch.isfinite(value.detach()).all()):
        return
    remedy = f"Lower the learning rate and resume; the last good state is in {folder}."
    if batch_of_step is None:
        raise DivergenceError(
            f"the {what} of step {step} is not finite", value=float(value.detach()), remedy=remedy
        )
    path = folder / f"bad-batch-{step}.safetensors"
    raise diverged(what, value, step, path, batch_of_step(step), f"Look at the batch. {remedy}")


def diverged(
    what: str, value: Tensor, step: int, path: Path, batch: Mapping[str, Tensor], remedy: str
) -> DivergenceError:
    """What to raise where ``value`` is not finite, once its batch was written to ``path``.

    Raises:
        OutputError: the batch cannot be written.
    """
    write_tensors(path, batch)
    return DivergenceError(
        f"the {what} of step {step} is not finite; its batch is in {path}",
        value=float(value.detach().float().mean()),
        remedy=remedy,
    )


def ema_update(
    decay: float,
) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """Exponential moving average whose decay grows with the step count (as in diffusers)."""

    @torch.no_grad()
    def update(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        steps = int(count)
        rate = 1 - min(decay, (1 + steps) / (10 + steps))
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                old.lerp_(new, rate)
            else:
                old.copy_(new)

    return update
