"""A graph small enough for a real TensorRT engine and for a stand-in: one product, and its maximum.

pytest puts this folder on sys.path (pyproject.toml).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hcma_fast.specs import BatchRange, IOSpec, TensorSpec

WIDTH = 256
SPEC = IOSpec(
    "align",
    (
        TensorSpec("z", ("batch", WIDTH)),
        TensorSpec("timestep", ("batch",), "int64"),
        TensorSpec("lambdas", (2,)),
    ),
    (TensorSpec("z_aligned", ("batch", WIDTH)), TensorSpec("loss", ("batch",))),
    BatchRange(1, 2, 4),
)
WEIGHT = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype("float32") / 16


def expected(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the graph computes, in float64."""
    z = inputs["z"].cpu().double() @ torch.from_numpy(WEIGHT).double()
    z = z * inputs["lambdas"][0].cpu() + inputs["timestep"].cpu()[:, None]
    return {"z_aligned": z.float(), "loss": z.amax(1).float()}


def make_inputs(batch: int, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "z": torch.randn(batch, WIDTH, generator=generator).to(device),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator).to(device),
        "lambdas": torch.rand(2, generator=generator).to(device),
    }
