"""The suites of `hcma-fast bench run`."""
