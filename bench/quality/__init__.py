"""Evaluation of images: `hcma-fast eval` and `hcma-fast bench quality`."""
