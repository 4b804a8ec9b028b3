"""Benchmarks, peers and judges, imported as ``hcma_fast.bench``."""
