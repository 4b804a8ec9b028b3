"""Checkpoints: find, check, read."""
