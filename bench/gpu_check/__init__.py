"""One script for the first minutes on a GPU: `make gpu-check`."""
