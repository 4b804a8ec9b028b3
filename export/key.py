"""What an engine depends on, as a hash: the name under which the cache keeps it."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib import metadata
from pathlib import Path

from hcma_fast import specs
from hcma_fast.export.onnx_graph import OPSET
from hcma_fast.export.target import Target, backend_version, machine
from hcma_fast.kernels import cosine_loss

_PACKAGE = Path(specs.__file__).parent
#: whose code becomes part of the graphs
_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


def key_parts(weights_hash: str, target: Target) -> dict[str, str]:
    """All that an engine depends on, by what a user would call it.

    Raises:
        BackendError: the backend is not installed.
    """
    size = (
        f"{target.height}x{target.width}"
        if (target.height, target.width) != (None, None)
        else "as trained"
    )
    return {
        "weights": weights_hash,
        "backend": target.backend,
        "backend version": backend_version(target.backend),
        "precision": target.precision,
        "batch": str(target.batch_range),
        "image size": size,
        "machine": machine(target),
        "options": f"fuse {target.fuse}, strip {target.strip_weights}, "
        f"workspace {target.workspace_mib}",
        "libraries": ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES),
        "code of hcma-fast": f"{code_hash()}, opset {OPSET}",
    }


def key_of(parts: dict[str, str]) -> str:
    """sha256 of all parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def code_hash() -> str:
    """Our own code decides what a graph computes: a changed line must not find an old engine."""
    digest = hashlib.sha256()
    files = [_PACKAGE / name for name in ("specs.py", "losses.py", "config.py")]
    files.append(Path(cosine_loss.__file__))
    folders = [Path(__file__).parent, _PACKAGE / "models"]
    files += [path for folder in folders for path in folder.glob("*.py")]
    # by content, not by place: the same in a checkout and where it is installed
    for name, content in sorted((path.name.encode(), path.read_bytes()) for path in files):
        digest.update(name + b"\0" + content)
    return digest.hexdigest()
