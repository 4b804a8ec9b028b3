"""Engines, sampler and pipeline."""
