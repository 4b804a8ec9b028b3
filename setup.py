"""Packaging of hcma-fast: the top-level folders become sub-packages of ``hcma_fast``."""

from setuptools import setup

#: package -> folder; tests/test_packaging.py compares this with every folder that holds ``__init__.py``.
PACKAGE_DIR = {
    "hcma_fast": "hcma_fast",
    "hcma_fast.models": "hcma_fast/models",
    "hcma_fast.runtime": "hcma_fast/runtime",
    "hcma_fast.cli": "hcma_fast/cli",
    "hcma_fast.kernels": "kernels",
    "hcma_fast.export": "export",
    "hcma_fast.train": "train",
    "hcma_fast.bench": "bench",
}

setup(name="hcma-fast", version="0.1.0", packages=list(PACKAGE_DIR), package_dir=PACKAGE_DIR)
