"""Plots as PNG files, without pyplot: it would choose a window system and keep the figures."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any

from hcma_fast.errors import BackendError


def check_installed() -> None:
    """Before anything is measured.

    Raises:
        BackendError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise BackendError(
            "plots need a package that is not installed",
            value="matplotlib",
            remedy='Run pip install "hcma-fast[eval]", or leave out --out.',
        )


def new_figure(width: float, height: float) -> Any:
    """In inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def figure_png(figure: Any) -> bytes:
    """The file's content."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
