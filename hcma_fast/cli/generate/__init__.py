"""`hcma-fast generate`."""
