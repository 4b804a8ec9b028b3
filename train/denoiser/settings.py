"""How stage 2 runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hcma_fast.config import Real, Whole
from hcma_fast.train.loop import settings as stage_settings
from hcma_fast.train.loop.settings import Training

Trainable = Literal["fuser", "all"]
Rates = Literal["uniform", "fixed"]


class DenoiserTraining(Training):
    """How stage 2 runs; rate, decay, optimiser and shares dropped are those of GLIGEN's code."""

    epochs: Whole = Field(10, gt=0)
    batch: Whole = Field(64, gt=0, description="images a step, over all processes")
    micro_batch: Whole = Field(8, gt=0, description="images that a process takes at once")
    lr: Real = Field(5e-5, gt=0)
    weight_decay: Real = Field(0.0, ge=0)
    decoupled_decay: bool = True
    warmup: Whole = Field(1000, ge=0, description="steps")
    trainable: Trainable = "fuser"
    aligned_share: Real = Field(0.5, ge=0, le=1, description="of the images")
    eta0: Real | None = Field(None, gt=0, description="default: the model's")
    rates: Rates = "uniform"
    drop_caption: Real = Field(0.5, ge=0, le=1, description="share of the images")
    drop_boxes: Real = Field(0.1, ge=0, le=1, description="share of the images")
    # it computes the same twice
    gradient_checkpointing: bool = False


FREE = stage_settings.FREE | {"gradient_checkpointing"}
"""Settings that leave the weights as they are"""
