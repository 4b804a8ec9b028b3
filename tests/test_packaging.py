"""The package as users get it: metadata, the built wheel outside the checkout, the commands."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LICENCE_OF_THE_ART = "hcma_fast/train/data/assets/LICENSE-noto-emoji.txt"


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """The arguments of setup()."""
    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", arguments.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def package_folders() -> set[str]:
    """Folders with an ``__init__.py``, but for tests, hidden ones and what builds leave behind."""
    skipped = {"tests", "build", "dist", "demo"}
    tops = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in skipped]
    return {
        str(init.parent.relative_to(ROOT))
        for top in tops
        if not top.name.startswith(".") and not (top / "pyvenv.cfg").exists()
        for init in top.rglob("__init__.py")
    }


def run_python(code: str, cwd: Path, **environment: str) -> str:
    """stdout of ``python -c code`` in ``cwd``, which is at the head of sys.path as usual."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(metadata: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: setuptools would write into the checkout."""
    source = tmp_path_factory.mktemp("source")
    tops = {Path(folder).parts[0] for folder in metadata["package_dir"].values()}
    for top in tops:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / top, source / top, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    folder = tmp_path_factory.mktemp("wheel")
    # the options keep pip from asking an index for anything
    command = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "pip", *command, "-w", folder, source], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the wheel, without its requirements."""
    folder = tmp_path_factory.mktemp("installed")
    command = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", folder]
    subprocess.run([sys.executable, "-m", "pip", *command, wheel], check=True)
    return folder


def test_every_folder_with_an_init_is_a_package(metadata: dict[str, Any]) -> None:
    assert set(metadata["package_dir"].values()) == package_folders()
    assert metadata["packages"] == list(metadata["package_dir"])


def test_kernels_init_is_a_docstring() -> None:
    # transformers imports it by mistake from the checkout, and looks for a version in it
    (statement,) = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
    assert isinstance(statement.value.value, str)


def test_wheel_holds_every_module_and_asset(metadata: dict[str, Any], contents: set[str]) -> None:
    expected = set()
    for package, folder in metadata["package_dir"].items():
        base = package.replace(".", "/")
        expected |= {f"{base}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        for path in (ROOT / folder / "assets").rglob("*"):
            if path.is_file():
                expected.add(f"{base}/{path.relative_to(ROOT / folder).as_posix()}")
    assert "hcma_fast/train/data/assets/sprites.png" in expected
    assert expected - contents == set()


def test_wheel_has_only_one_top_level_package(contents: set[str]) -> None:
    # a top-level `kernels` breaks transformers for all who install us
    tops = {name.split("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hcma_fast"}


def test_wheel_has_the_licences(contents: set[str]) -> None:
    assert LICENCE_OF_THE_ART in contents
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in contents)


def test_wheel_works_outside_of_the_checkout(
    metadata: dict[str, Any], installed: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {metadata['packages']!r}:\n"
        "    print(importlib.import_module(name).__file__)\n"
        "from hcma_fast.train.data.emoji_scenes import render_scene, sample_scene\n"
        "render_scene(sample_scene('test', 0), 'test', 0)\n"
        "import hcma_fast.layout\n"
        "print(hcma_fast.layout.__file__)\n"
    )
    places = run_python(code, tmp_path, PYTHONPATH=str(installed)).split()
    assert len(places) == len(metadata["packages"]) + 1
    assert [place for place in places if not Path(place).is_relative_to(installed)] == []


def test_installed_command_says_its_version(
    metadata: dict[str, Any], installed: Path, tmp_path: Path
) -> None:
    script = next(path for path in (installed / "bin").iterdir() if path.stem == "hcma-fast")
    done = subprocess.run(
        [sys.executable, script, "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"hcma-fast {metadata['version']}\n"


def test_command_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, hcma_fast.cli.app\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'onnx'} & sys.modules.keys()))"
    )
    assert run_python(code, tmp_path) == "[]\n"


def test_transformers_works_in_the_checkout() -> None:
    # with the checkout on sys.path, transformers takes kernels/ for the PyPI package of that name
    code = "import transformers; from transformers import CLIPTextModel; print(CLIPTextModel)"
    assert "CLIPTextModel" in run_python(code, ROOT)


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = map(Requirement, lines)
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_only_gpu_and_cpu_extras_exclude_each_other(metadata: dict[str, Any]) -> None:
    extras = {name: set(requirements(lines)) for name, lines in metadata["extras_require"].items()}
    clash = {"onnxruntime", "onnxruntime-gpu"}
    found = {
        pair
        for pair in combinations(sorted(extras), 2)
        if clash <= set().union(*map(extras.get, pair))
    }
    assert found == {("cpu", "gpu"), ("gpu", "onnxruntime")}
    assert not any(clash <= names for names in extras.values())
    assert not clash & set(requirements(metadata["install_requires"]))


def test_constraints_pin_versions_that_setup_allows(metadata: dict[str, Any]) -> None:
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = requirements(lines)
    assert all(str(pin.specifier).startswith("==") for pin in pins.values())
    unpinned = set()
    for group in (metadata["install_requires"], *metadata["extras_require"].values()):
        for name, requirement in requirements(group).items():
            if name in pins:
                assert str(pins[name].specifier)[2:] in requirement.specifier, name
            else:
                unpinned.add(name)
    # constraints.txt says why
    assert unpinned == {"onnxruntime-gpu", "tensorrt", "triton"}
    assert str(pins["torch"].specifier) == "==2.13.0"


def test_the_oldest_constraints_are_the_lower_bounds(metadata: dict[str, Any]) -> None:
    text = (ROOT / "constraints-oldest.txt").read_text()
    pins = requirements([line for line in text.splitlines() if line and not line.startswith("#")])
    bounds = {}
    for group in ("onnxruntime", "gpu"):
        bounds |= requirements(metadata["extras_require"][group])
    bounds |= requirements(metadata["install_requires"])
    # another wheel in the same place
    del bounds["onnxruntime-gpu"]
    assert pins.keys() == bounds.keys()
    for name, bound in bounds.items():
        lowest = [s.version for s in bound.specifier if s.operator == ">="]
        assert [s.version for s in pins[name].specifier] == lowest, name


def test_changelog_knows_the_version(metadata: dict[str, Any]) -> None:
    assert f"[{metadata['version']}]" in (ROOT / "CHANGELOG.md").read_text()
