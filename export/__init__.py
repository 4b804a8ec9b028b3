"""Export of every HCMA graph to compiled engines, imported as ``hcma_fast.export``."""
