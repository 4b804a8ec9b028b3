"""Data, training loops and checkpoints, imported as ``hcma_fast.train``."""
