"""Estimates from counted operations and bytes; nothing here is timed."""
