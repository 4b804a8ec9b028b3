"""Data sets, and the cache of their latents."""
