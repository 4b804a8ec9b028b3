"""torch-compile engines by AOTInductor."""
