"""The key of an engine folder."""

from __future__ import annotations

import ast
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hcma_fast.export import key as key_module
from hcma_fast.export.key import key_of, key_parts
from hcma_fast.export.target import Target, device_for

#: modules that the export imports and whose code no graph depends on
NO_GRAPH_CODE = {
    "errors": "what is said when something fails",
    "files": "how files are written",
    "engine": "the protocol of what runs a graph",
    "opened": "how files are opened",
    "scalars": "numbers that users pass",
    "torch_state": "torch's defaults around a call",
    "kernels.launch": "how Triton kernels are launched",
    "sampling.savings": "settings of the sampler",
    "sampling.schedule": "makes plans, which step graphs take as an input",
    "sampling.solvers": "makes plans, which step graphs take as an input",
    "schedule": "makes plans, which step graphs take as an input",
    "models.checkpoint.info": "hcma.json and the checks of a folder",
    "export.signature": "compares a graph with its spec",
    "models.checkpoint.located": "finds and opens a model's files",
    "models.checkpoint.hub": "fetches a model's files",
    "models.checkpoint.options": "its fields are parts of the weights' hash",
    "models.checkpoint.state_hash": "compares encoders, and changes nothing",
    "models.checkpoint.formats.foreign": "refuses other models, and changes nothing",
    "models.checkpoint.formats.pickles": "writes weights, which are hashed after that",
    "models.checkpoint.formats.tensor_file": "reads names and shapes",
    "export.onnx.file": "reads graphs that were made elsewhere",
    "models.checkpoint.json_files": "how small files are read",
    "models.checkpoint.scheduler": "refuses other schedules, and changes nothing",
    "export.target": "its fields are parts of the key",
    "export.validate": "compares graphs that are made elsewhere",
}


def _closure(roots: tuple[str, ...]) -> set[str]:
    """Modules of hcma_fast that ``roots`` import, directly or not; packages left out."""
    seen: set[str] = set()
    todo = list(roots)
    while todo:
        module = todo.pop()
        spec = find_spec(f"hcma_fast.{module}") if module not in seen else None
        if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hcma_fast"):
                base = (node.module or "").removeprefix("hcma_fast").removeprefix(".")
                names = [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
                todo += [name for name in names if name and _is_module(name)]
    return seen


def _is_module(name: str) -> bool:
    try:
        return find_spec(f"hcma_fast.{name}") is not None
    except ModuleNotFoundError:
        return False


def test_every_module_that_shapes_a_graph_is_in_the_key() -> None:
    found = _closure(("export.onnx.export", "export.compile", "sampling.exported"))
    assert found - NO_GRAPH_CODE.keys() == set(key_module.GRAPH_CODE)
    assert found >= NO_GRAPH_CODE.keys()


def test_comments_and_docstrings_do_not_change_the_key() -> None:
    plain = "X = 1\n\n\ndef f() -> int:\n    return X\n"
    told = plain.replace("X = 1", '"""A."""\nX = 1\n"""B."""').replace(
        "int:", 'int:  # why\n    """C."""'
    )
    assert key_module._syntax(plain) == key_module._syntax(told)
    assert key_module._syntax(plain) != key_module._syntax(plain.replace("1", "2"))


def test_changed_code_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    here = key_module.code_hash.__wrapped__()
    source = key_module._source
    for module in key_module.GRAPH_CODE:
        changed = partial(lambda name, m: source(m) + ("changed = 1" if m == name else ""), module)
        monkeypatch.setattr(key_module, "_source", changed)
        assert key_module.code_hash.__wrapped__() != here


def test_code_for_a_gpu_has_a_key_for_each_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("torch-compile", device="cuda")
    on_cpu = key_parts("w", Target("torch-compile"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    for capability in ((8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda given=capability: given)
        found[capability] = key_parts("w", target)
        assert (
            found[capability]["machine"] == f"{on_cpu['machine']} sm_{capability[0]}{capability[1]}"
        )
        assert key_parts("w", Target("torch-compile")) == on_cpu
    assert len({key_of(parts) for parts in (on_cpu, *found.values())}) == 3


def test_only_compiled_code_is_for_a_device() -> None:
    assert device_for("torch-compile", "cuda:0") == "cuda"
    assert device_for("torch-compile", "cpu") == "cpu"
    assert device_for("onnxruntime", "cuda") == "cpu"
