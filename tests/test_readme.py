"""The README's examples run as they stand, and its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hcma_fast.bench.soak.report import read_soak
from hcma_fast.bench.speed.harness.report import read_results

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user with an empty cache; the first example that needs an engine builds it."""
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "HCMA_FAST_CACHE": str(cache), "PYTHONSAFEPATH": "1"}


def test_python_example(tmp_path: Path, environment: dict[str, str]) -> None:
    code = "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tensor" in done.stdout
    assert (tmp_path / "0.png").is_file() and (tmp_path / "1.png").is_file()
    with Image.open(tmp_path / "dog.png") as image:
        assert image.size == (64, 64)


def test_command_line_examples(tmp_path: Path, environment: dict[str, str]) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    # FOLDER stands for a checkpoint of the reader's
    commands = [line for line in lines if line.startswith("hcma-fast ") and "FOLDER" not in line]
    assert [shlex.split(line)[1] for line in commands] == [
        "doctor",
        "build",
        "generate",
        "generate",
    ]
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for line in commands:
        done = subprocess.run(
            [sys.executable, "-m", "hcma_fast.cli.app", *shlex.split(line)[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    wanted = 1 + len((ROOT / "docs/demo.jsonl").read_text().splitlines())
    sidecars = [json.loads(path.read_text()) for path in (tmp_path / "pictures").glob("*.json")]
    assert len(sidecars) == wanted
    assert all(sidecar["engine_hash"] for sidecar in sidecars)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    for link in links:
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link


RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_results_behind_the_tables_can_be_shown(path: Path) -> None:
    if path.stem == "soak":
        found = read_soak(path)
        assert found is not None and found.minutes >= 20 and not (found.problems or found.not_shown)
        return
    for report in read_results(path).reports:
        assert not (report.failed or report.quick or any(row.void for row in report.rows))


@pytest.mark.parametrize(
    ("group", "row"),
    [
        ("aligned, batch 1", "hcma-fast onnxruntime"),
        ("aligned, batch 1", "hcma-fast openvino bfloat16"),
        ("aligned, batch 8", "hcma-fast openvino bfloat16"),
        ("aligned, batch 1", "plain loop, UNet on openvino bfloat16"),
    ],
)
def test_headline_figures_are_those_of_the_results(group: str, row: str) -> None:
    (peers,) = (
        r for r in read_results(ROOT / "docs/results/peers.json").reports if r.suite == "peers"
    )
    (found,) = (r for r in peers.rows if (r.group, r.name) == (group, row))
    assert found.speedup is not None
    for page in ("README.md", "docs/performance.md"):
        assert f"{found.speedup:.2f}" in (ROOT / page).read_text(), page
