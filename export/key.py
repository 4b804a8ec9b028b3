"""What an engine depends on, as a hash: the name under which the cache keeps it."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from hcma_fast.export.onnx.export import OPSET
from hcma_fast.export.target import Target, backend_version, machine

#: modules of hcma_fast that decide what a graph computes; tests/export/test_key.py compares it with
#: what the export imports
GRAPH_CODE = (
    "config",
    "losses",
    "specs",
    "kernels.cosine_loss",
    "kernels.update_sums",
    "models.aligner",
    "models.heads",
    "models.regions",
    "models.text",
    "models.unet",
    "models.vit",
    "models.checkpoint.configs",
    "models.checkpoint.folder",
    "models.checkpoint.formats.architecture",
    "models.checkpoint.formats.gligen",
    "models.checkpoint.formats.lora",
    "models.checkpoint.formats.names",
    "models.checkpoint.formats.recognise",
    "models.checkpoint.formats.single_file",
    "models.checkpoint.parts",
    "models.checkpoint.tokenizer",
    "models.checkpoint.weight_files",
    "sampling.exported",
    "export.channels_last",
    "export.compile",
    "export.precision",
    "export.weights_file",
    "export.onnx.export",
    "export.onnx.merge_products",
    "export.onnx.trace",
    "export.onnx.translations",
    "export.backends.aoti.build",
    "export.backends.onnxruntime.session",
    "export.backends.openvino.model",
    "export.backends.trt.build",
)
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
        f"workspace {target.workspace_mib}, tuning {target.tuning}",
        "libraries": ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES),
        "code of hcma-fast": f"{code_hash()}, opset {OPSET}",
    }


def key_of(parts: dict[str, str]) -> str:
    """sha256 of all parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def code_hash() -> str:
    """Our own code decides what a graph computes: a changed line must not find an old engine.

    Comments, docstrings and layout do not count, so that editing them keeps a user's engines.
    """
    digest = hashlib.sha256()
    for module in GRAPH_CODE:
        digest.update(f"{module}\0{_syntax(_source(module))}\0".encode())
    return digest.hexdigest()


def _source(module: str) -> str:
    """Found by name: the folders lie elsewhere in a checkout than where it is installed."""
    spec = find_spec(f"hcma_fast.{module}")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).read_text(encoding="utf-8")


def _syntax(source: str) -> str:
    """The syntax tree without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # a docstring, or a string below an assignment that documents it
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(line: ast.stmt) -> bool:
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )
