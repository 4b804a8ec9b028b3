"""One step of the sampler, and the loops that call it."""
