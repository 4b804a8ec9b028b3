"""hcma-fast: train, compile and serve grounded text-to-image generation with HCMA."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcma_fast.layout import Layout
    from hcma_fast.runtime.pipeline import HCMAPipeline
    from hcma_fast.runtime.request import Request, Result

try:
    __version__ = metadata.version("hcma-fast")
except metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.1.0"

__all__ = ["HCMAPipeline", "Layout", "Request", "Result", "__version__"]

#: lazy: `hcma-fast --version` and `doctor` must not pay for importing torch and diffusers
_MODULES = {
    "HCMAPipeline": "hcma_fast.runtime.pipeline",
    "Layout": "hcma_fast.layout",
    "Request": "hcma_fast.runtime.request",
    "Result": "hcma_fast.runtime.request",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
