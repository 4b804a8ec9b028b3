"""The scripts of examples/ run in this process with few steps, the notebook in a kernel."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]
    return main


def test_scripts(tmp_path: Path, random_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {
        "one_image.py",
        "batch.py",
        "engine_folder.py",
    }
    one = tmp_path / "one.png"
    # of fewer steps the alignment's window may hold none
    main_of("one_image.py")("eager", 10, one)
    with Image.open(one) as image:
        assert image.size == (64, 64)
    assert "caption: tensor" in capsys.readouterr().out

    batch = tmp_path / "batch"
    main_of("batch.py")("eager", 3, batch)
    assert capsys.readouterr().out == ""
    images = [(batch / f"{index}.png").read_bytes() for index in range(3)]
    # same caption, boxes and seed, another negative prompt
    assert images[0] != images[1]

    engine = tmp_path / "engine.png"
    main_of("engine_folder.py")(random_engine, 3, engine)
    with Image.open(engine) as image:
        assert image.mode == "RGB"


@pytest.mark.slow
def test_notebook(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "alignment.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
    assert pictures[0]["data"]["image/png"] != pictures[1]["data"]["image/png"]
