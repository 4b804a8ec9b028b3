"""hcma-fast: train, compile and serve grounded text-to-image generation with HCMA."""
