"""Formats beside diffusers' folder: single files, GLIGEN's checkpoints and adapters, pickles."""
