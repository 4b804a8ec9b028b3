"""How any stage runs: what the loop of :mod:`hcma_fast.train.loop.stage` goes by."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from hcma_fast.config import MAX_SEED, Real, Whole


class Training(BaseModel):
    """Length, batch and optimiser of a stage; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Whole = Field(60, gt=0)
    batch: Whole = Field(1024, gt=0, description="images a step, over all processes")
    micro_batch: Whole = Field(128, gt=0, description="images that a process takes at once")
    lr: Real = Field(1e-3, gt=0)
    weight_decay: Real = Field(5e-4, ge=0)
    decoupled_decay: bool = Field(False, description="AdamW instead of Adam")
    warmup: Whole = Field(0, ge=0, description="steps")
    cosine: bool = False
    clip_norm: Real | None = Field(None, gt=0)
    ema_decay: Real = Field(0.0, ge=0, lt=1)
    bf16: bool = False
    seed: Whole = Field(0, ge=0, le=MAX_SEED)
    max_steps: Whole | None = Field(
        None, gt=0, description="stop after so many, if epochs are more"
    )
    # what may differ between a run and its continuation
    workers: Whole = Field(0, ge=0)
    log_every: Whole = Field(10, gt=0)
    checkpoint_every: Whole = Field(500, gt=0, description="steps; besides, at each epoch's end")
    keep: Whole = Field(2, gt=0, description="states kept")
    tensorboard: bool = True


FREE = {"workers", "log_every", "checkpoint_every", "keep", "tensorboard"}
"""Settings that leave the weights as they are"""
