"""Stage 2: GLIGEN's gated layers on aligned latents."""
