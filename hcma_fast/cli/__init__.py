"""The ``hcma-fast`` command."""
