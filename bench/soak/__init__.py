"""Mixed requests with faults, for a long time."""
