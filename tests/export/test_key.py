"""The key of an engine folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hcma_fast.export import key as key_module
from hcma_fast.export.key import key_of, key_parts
from hcma_fast.export.target import Target, device_for


def test_the_code_is_the_same_wherever_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout export/ lies beside hcma_fast/, and where it is installed in it."""
    here = key_module.code_hash.__wrapped__()
    package = tmp_path / "hcma_fast"
    for folder in ("models", "export"):
        (package / folder).mkdir(parents=True)
    sources = [
        (key_module._PACKAGE / n, package / n) for n in ("specs.py", "losses.py", "config.py")
    ]
    for folder, target in (
        (key_module._PACKAGE / "models", "models"),
        (Path(key_module.__file__).parent, "export"),
    ):
        sources += [(path, package / target / path.name) for path in folder.glob("*.py")]
    for source, copy in sources:
        shutil.copyfile(source, copy)
    monkeypatch.setattr(key_module, "_PACKAGE", package)
    monkeypatch.setattr(key_module, "__file__", str(package / "export" / "key.py"))
    assert key_module.code_hash.__wrapped__() == here
    (package / "config.py").write_text("changed")
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
