"""Stage 1: the aligner."""
