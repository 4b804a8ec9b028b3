"""`hcma-fast train`."""
