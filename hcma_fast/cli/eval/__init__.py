"""`hcma-fast eval`."""
