"""Published peak rates of NVIDIA cards, from their data sheets, and published speeds on them."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

_SPECIAL_PER_CLOCK = 16
"""Exponentials that a multiprocessor starts per clock, from Turing to Blackwell (CUDA C++
programming guide, throughput of native arithmetic instructions)"""


class GPU(BaseModel):
    """One card; rates without sparsity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    half_flops: float
    """per second, float16 or bfloat16 on tensor cores with float32 sums"""
    float32_flops: float
    """per second, outside of the tensor cores (no TF32)"""
    bandwidth: float
    """of the memory, bytes per second"""
    multiprocessors: int
    clock: float
    """boost, Hz: the one of the rates above"""
    bfloat16: bool = True
    """on tensor cores"""
    source: str

    def rate(self, dtype: str) -> float:
        """Operations per second in a dtype."""
        half = dtype == "float16" or (dtype == "bfloat16" and self.bfloat16)
        return self.half_flops if half else self.float32_flops

    @property
    def special_rate(self) -> float:
        """Exponentials per second."""
        return self.multiprocessors * _SPECIAL_PER_CLOCK * self.clock


# Data sheets print tensor-core rates with 2:4 sparsity, which is twice the dense rate.
GPUS = {
    "h100": GPU(
        name="H100 SXM 80 GB",
        half_flops=989.4e12,
        float32_flops=66.9e12,
        bandwidth=3.35e12,
        multiprocessors=132,
        clock=1.83e9,
        source="NVIDIA H100 Tensor Core GPU data sheet; NVIDIA H100 architecture white paper",
    ),
    "h200": GPU(
        name="H200 SXM 141 GB",
        half_flops=989.4e12,
        float32_flops=66.9e12,
        bandwidth=4.8e12,
        multiprocessors=132,
        clock=1.83e9,
        source="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    "b200": GPU(
        name="B200 SXM 180 GB",
        half_flops=2250e12,
        float32_flops=75e12,
        bandwidth=8.0e12,
        multiprocessors=148,
        clock=1.855e9,
        source="NVIDIA Blackwell (HGX B200) data sheet; clock from its rate",
    ),
    "a100": GPU(
        name="A100 SXM 80 GB",
        half_flops=312e12,
        float32_flops=19.5e12,
        bandwidth=2.039e12,
        multiprocessors=108,
        clock=1.41e9,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    "l40s": GPU(
        name="L40S",
        half_flops=362.05e12,
        float32_flops=91.6e12,
        bandwidth=0.864e12,
        multiprocessors=142,
        clock=2.52e9,
        source="NVIDIA L40S data sheet",
    ),
    # twice as much with float16 sums, which no backend here asks for; the 4090 too
    "rtx5090": GPU(
        name="GeForce RTX 5090",
        half_flops=209.5e12,
        float32_flops=104.8e12,
        bandwidth=1.792e12,
        multiprocessors=170,
        clock=2.407e9,
        source="NVIDIA RTX Blackwell GPU architecture white paper, appendix A",
    ),
    "rtx4090": GPU(
        name="GeForce RTX 4090",
        half_flops=165.2e12,
        float32_flops=82.6e12,
        bandwidth=1.008e12,
        multiprocessors=128,
        clock=2.52e9,
        source="NVIDIA Ada GPU architecture white paper, appendix A",
    ),
    "t4": GPU(
        name="T4 16 GB",
        half_flops=65e12,
        float32_flops=8.1e12,
        bandwidth=0.32e12,
        multiprocessors=40,
        clock=1.59e9,
        bfloat16=False,
        source="NVIDIA T4 data sheet; NVIDIA Turing GPU architecture white paper",
    ),
}

#: the driver's name -> the card above; "H100 PCIe", "A100-PCIE-40GB" and laptops have other rates
_DRIVER_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "Tesla T4": "t4",
}


def card_of(name: str) -> str | None:
    """The card of :data:`GPUS` that the driver calls so; None where its rates are not here."""
    return _DRIVER_NAMES.get(name)


class Peer(NamedTuple):
    """What others published for plain Stable Diffusion 1.5: 512 pixels, guidance, batch 1."""

    gpu: str
    name: str
    evaluations_per_s: float


#: not measured here; plain: without GLIGEN's layers and without alignment
PEERS = (
    Peer("h100", "stable-fast", 104.6),
    Peer("h100", "torch.compile", 66),
    Peer("a100", "OneDiff", 76),
    Peer("a100", "diffusion-fast, bfloat16", 63),
    Peer("a100", "torch.compile", 50),
    Peer("rtx4090", "OneDiff", 91),
    Peer("rtx4090", "torch.compile", 50),
    Peer("t4", "diffusers", 7.6),
)
