"""`hcma-fast bench`."""
