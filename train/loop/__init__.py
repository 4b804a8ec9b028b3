"""The training loop, its states and its run folder."""
