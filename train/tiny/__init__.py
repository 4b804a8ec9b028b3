"""The parts of the embedded model `tiny`."""
