"""One folder per backend: how it builds an engine, and how it runs one."""
