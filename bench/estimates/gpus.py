"""Published peak rates of NVIDIA cards, from their data sheets."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
    source: str

    def rate(self, dtype: str) -> float:
        """Operations per second in a dtype."""
        return self.half_flops if dtype in ("float16", "bfloat16") else self.float32_flops


# Data sheets print tensor-core rates with 2:4 sparsity, which is twice the dense rate.
GPUS = {
    "h100": GPU(
        name="H100 SXM 80 GB",
        half_flops=989.4e12,
        float32_flops=66.9e12,
        bandwidth=3.35e12,
        source="NVIDIA H100 Tensor Core GPU data sheet; NVIDIA H100 architecture white paper",
    ),
    "a100": GPU(
        name="A100 SXM 80 GB",
        half_flops=312e12,
        float32_flops=19.5e12,
        bandwidth=2.039e12,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    "l40s": GPU(
        name="L40S",
        half_flops=362.05e12,
        float32_flops=91.6e12,
        bandwidth=0.864e12,
        source="NVIDIA L40S data sheet",
    ),
    # 330.3 TFLOP/s with float16 sums, which no backend here asks for
    "rtx4090": GPU(
        name="GeForce RTX 4090",
        half_flops=165.2e12,
        float32_flops=82.6e12,
        bandwidth=1.008e12,
        source="NVIDIA Ada GPU architecture white paper, appendix A",
    ),
}
