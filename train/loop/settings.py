"""How any stage runs: what the loop of :mod:`hcma_fast.train.loop.stage` goes by."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Training(BaseModel):
    """Length, batch and optimiser of a stage; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(60, gt=0)
    batch: int = Field(1024, gt=0, description="images a step, over all processes")
    micro_batch: int = Field(128, gt=0, description="images that a process takes at once")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    decoupled_decay: bool = Field(False, description="AdamW instead of Adam")
    warmup: int = Field(0, ge=0, description="steps")
    cosine: bool = False
    clip_norm: float | None = Field(None, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    bf16: bool = False
    seed: int = Field(0, ge=0)
    max_steps: int | None = Field(None, gt=0, description="stop after so many, if epochs are more")
    # what may differ between a run and its continuation
    workers: int = Field(0, ge=0)
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0, description="steps; besides, at each epoch's end")
    keep: int = Field(2, gt=0, description="states kept")
    tensorboard: bool = True


FREE = {"workers", "log_every", "checkpoint_every", "keep", "tensorboard"}
"""Settings that leave the weights as they are"""
