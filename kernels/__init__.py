"""Triton kernels of hcma-fast, imported as ``hcma_fast.kernels``. Keep this file a docstring."""
