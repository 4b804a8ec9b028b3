"""Networks of HCMA and their weights."""
