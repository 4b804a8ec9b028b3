"""hcma-fast: train, compile and serve grounded text-to-image generation with HCMA."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcma_fast.layout import Layout
    from hcma_fast.runtime.pipeline import HCMAPipeline

try:
    __version__ = metadata.version("hcma-fast")
except metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.1.0"

__all__ = ["HCMAPipeline", "Layout", "__version__"]


def __getattr__(name: str) -> Any:
    # lazy: `hcma-fast --version` and `doctor` must not pay for importing torch and diffusers
    if name == "HCMAPipeline":
        from hcma_fast.runtime.pipeline import HCMAPipeline

        return HCMAPipeline
    if name == "Layout":
        from hcma_fast.layout import Layout

        return Layout
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
