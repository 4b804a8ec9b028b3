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
from hcma_fast.cli.app import main
from hcma_fast.config import PRESETS
from hcma_fast.export.cache import cached_folder
from hcma_fast.export.manifest import load_manifest
from hcma_fast.export.target import Target

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    """The words of each ``hcma-fast`` line, after the program's name."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    # FOLDER stands for a checkpoint of the reader's
    ours = [line for line in lines if line.startswith("hcma-fast ") and "FOLDER" not in line]
    return [shlex.split(line)[1:] for line in ours]


def check_pictures(folder: Path) -> None:
    """Those of both ``generate`` lines, made by an engine."""
    wanted = 1 + len((ROOT / "docs/demo.jsonl").read_text().splitlines())
    sidecars = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert len(sidecars) == wanted
    assert all(sidecar["engine_hash"] for sidecar in sidecars)


@pytest.fixture
def small_tiny(
    random_checkpoint: Path, random_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preset ``tiny`` is the small random model, and its engine is in the cache already."""
    monkeypatch.setitem(PRESETS, "tiny", random_checkpoint)
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    engine = cached_folder(load_manifest(random_engine).weights_hash, Target("onnxruntime"))
    shutil.copytree(random_engine, engine)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small_tiny")
def test_python_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec("\n".join(blocks("python")), {})
    assert "tensor" in capsys.readouterr().out
    for name in ("0.png", "1.png", "dog.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (16, 16)


@pytest.mark.smoke
@pytest.mark.usefixtures("small_tiny")
def test_command_line_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [words[0] for words in commands()] == ["doctor", "build", "generate", "generate"]
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/demo.jsonl", tmp_path / "docs")
    for words in commands():
        code = main(words)
        said = capsys.readouterr()
        assert code == 0, said.err
        if words[0] == "build":
            assert said.out.strip() == str(next((tmp_path / "cache").glob("onnxruntime-*[0-9a-f]")))
    check_pictures(tmp_path / "pictures")


@pytest.mark.slow
def test_examples_of_a_new_user(tmp_path: Path) -> None:
    """All of them as processes, with ``tiny`` and an empty cache."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    environment = {
        **os.environ,
        "HCMA_FAST_CACHE": str(tmp_path / "cache"),
        "PYTHONSAFEPATH": "1",
    }
    programs = [["-c", "\n".join(blocks("python"))]]
    programs += [["-m", "hcma_fast.cli.app", *words] for words in commands()]
    for program in programs:
        done = subprocess.run(
            [sys.executable, *program],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{program}\n{done.stderr}"
    assert (tmp_path / "0.png").is_file() and (tmp_path / "1.png").is_file()
    with Image.open(tmp_path / "dog.png") as image:
        assert image.size == (64, 64)
    check_pictures(tmp_path / "pictures")


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            if not link.startswith("http"):
                assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


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
