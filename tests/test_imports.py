"""The sources import in one direction only, and each module can be imported."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "export", "train", "bench")

#: design.md section 6: a module may import from its own layer and the ones above
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "scalars", "config", "files", "opened", "program"),
    (
        "box_lists",
        "layout",
        "schedule",
        "seeds",
        "torch_state",
        "losses",
        "specs",
        "overlay",
        "engine",
    ),
    ("kernels",),
    ("models",),
    ("sampling",),
    ("export",),
    ("runtime",),
    ("train",),
    # bench holds the judge, which training must never see
    ("bench",),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder in ("hcma_fast", *FOLDERS):
        prefix = () if folder == "hcma_fast" else ("hcma_fast",)
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(module: str, source: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and target of each import in ``source``, those inside functions too.

    ``from hcma_fast import x`` gives ``hcma_fast.x``. Imports for type checkers only count too, for
    they bind two files just as much.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{start}.{alias.name}"


def back_edges(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Imports of ``module`` that point against the order of ``LAYERS``."""
    part = module.split(".")[1]
    found = []
    for line, target in imports(module, source, is_package=is_package):
        names = target.split(".")
        if names[0] != "hcma_fast" or len(names) == 1 or names[1].startswith("__"):
            continue
        # the package's own public names are re-exported from the runtime
        other = "runtime" if names[1] == "HCMAPipeline" else names[1].replace("Layout", "layout")
        if RANK[other] > RANK[part]:
            found.append(f"{module}:{line} imports {target}")
    return found


def test_every_part_has_a_layer() -> None:
    parts = {name.split(".")[1] for name in SOURCES if "." in name}
    assert parts == set(RANK) - ({"kernels"} - parts)


def test_no_import_points_backwards() -> None:
    found = [
        edge
        for module, path in SOURCES.items()
        if "." in module
        for edge in back_edges(module, path.read_text(), is_package=path.stem == "__init__")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hcma_fast.errors", "from hcma_fast.layout import Layout"),
        ("hcma_fast.losses", "def f():\n    import hcma_fast.models.vit"),
        ("hcma_fast.models.vit", "from hcma_fast import export"),
        ("hcma_fast.models.vit", "from ..runtime import engine"),
        ("hcma_fast.models.vit", "from hcma_fast import HCMAPipeline"),
        (
            "hcma_fast.export.build",
            "from hcma_fast.runtime.pipeline import HCMAPipeline",
        ),
        ("hcma_fast.kernels.rms", "if TYPE_CHECKING:\n    from hcma_fast.models import vit"),
        ("hcma_fast.runtime.pipeline", "from hcma_fast.train.loop.loop import run"),
        (
            "hcma_fast.train.loop.loop",
            "from hcma_fast.bench.quality.metrics.judge.model import Judge",
        ),
        ("hcma_fast.bench.speed.plain_and_ours", "from hcma_fast.cli.app import main"),
    ],
)
def test_a_back_edge_is_found(module: str, source: str) -> None:
    assert len(back_edges(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hcma_fast.layout", "from hcma_fast.errors import InputError"),
        ("hcma_fast.models.vit", "from . import heads"),
        ("hcma_fast.runtime.pipeline", "def f():\n    from hcma_fast.export.build import build"),
        ("hcma_fast.cli.app", "from hcma_fast import HCMAPipeline, Layout, __version__"),
        ("hcma_fast.errors", "import json\nfrom collections import abc"),
    ],
)
def test_an_import_in_the_right_direction_passes(module: str, source: str) -> None:
    assert back_edges(module, source) == []


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_third_party_imports_are_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    metadata = runpy.run_path(str(ROOT / "setup.py"))
    lines = [*metadata["INSTALL_REQUIRES"], *chain(*metadata["EXTRAS_REQUIRE"].values())]
    required = {canonical(Requirement(line).name) for line in lines}
    distributions = packages_distributions()
    unknown = set()
    for module, path in SOURCES.items():
        for line, target in imports(module, path.read_text(), is_package=path.stem == "__init__"):
            top = target.split(".")[0]
            if top in sys.stdlib_module_names or top == "hcma_fast":
                continue
            if not {canonical(name) for name in distributions.get(top, [top])} & required:
                unknown.add(f"{module}:{line} imports {top}")
    assert unknown == set()


def test_every_module_can_be_imported() -> None:
    for module, path in SOURCES.items():
        imported = importlib.import_module(module)
        assert imported.__file__ is not None
        assert Path(imported.__file__).resolve() == path


def test_no_file_is_named_like_a_library() -> None:
    # a folder of ours at the head of sys.path would hide the library from everyone
    names = {path.name for path in SOURCES.values()}
    assert not names & {"onnx.py", "triton.py", "tensorrt.py"}


def test_no_folder_is_crowded() -> None:
    crowded = Counter(path.parent for path in SOURCES.values() if path.stem != "__init__")
    assert {folder: count for folder, count in crowded.items() if count > 16} == {}
