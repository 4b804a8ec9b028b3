"""The key of an engine folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hcma_fast.export import key as key_module


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
