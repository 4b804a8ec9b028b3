"""build, and generate on what it built."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hcma_fast.specs import GRAPH_NAMES


@pytest.fixture
def build(cli: Any, random_checkpoint: Path) -> Any:
    return lambda *argv: cli("build", "--model", random_checkpoint, *argv)


def test_dry_run_shows_graphs_and_folder_and_writes_nothing(build: Any, tmp_path: Path) -> None:
    result = build("--dry-run", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["folder"].startswith(str(tmp_path / "cache" / "onnxruntime-"))
    assert list(report["graphs"]) == list(GRAPH_NAMES)
    assert report["graphs"]["align"]["inputs"]["z"] == {
        "shape": ["batch", 4, 8, 8],
        "dtype": "float32",
    }
    assert not (tmp_path / "cache").exists()
    result = build("--dry-run", "--out", "engine")
    assert result.out == "engine\n"
    for word in ("unet_grounded", "encoder_hidden_states", "(batch, 77, 16)", "float32"):
        assert word in result.err
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("code", "argv", "word"),
    [
        (4, ["--backend", "magic"], "magic"),
        (2, ["--backend", "eager"], "nothing to build"),
        (3, ["--model", "tiniest"], "tiniest"),
        (3, ["--out", "file"], "file"),
        (3, ["--out", "file/below"], "file/below"),
        (3, ["--out", "other"], "not an engine folder"),
        (3, ["--out", "other", "--force"], "not an engine folder"),
    ],
)
def test_bad_input(build: Any, code: int, argv: list[str], word: str) -> None:
    Path("file").write_text("")
    Path("other").mkdir()
    Path("other/mine.txt").write_text("")
    build(*argv).failed(code, word)
    assert sorted(os.listdir()) == ["file", "other"]
    assert os.listdir("other") == ["mine.txt"]


def test_build_then_generate_then_tamper(
    build: Any, cli: Any, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test, because each build takes long."""
    built = build("--json")
    assert built.code == 0, built.err
    report = json.loads(built.out)
    assert all(0 <= g["parity"] <= g["tolerance"] for g in report["graphs"].values())
    assert list(report["graphs"]) == list(GRAPH_NAMES)
    for graph in GRAPH_NAMES:
        assert graph in built.err
    folder = Path(report["folder"])

    # the cache has it now, for build and for generate
    again = build()
    assert (again.code, again.out) == (0, f"{folder}\n")
    assert "in the cache already" in again.err
    options = ("--prompt", "a dog", "--box", "dog:0,0,0.5,1", "--steps", 2, "--seed", 0)
    first = cli("generate", "--model", random_checkpoint, *options, "--out", "one", "--json")
    assert first.code == 0, first.err
    assert "Building" not in first.err
    record = json.loads(first.out)["images"][0]["record"]
    assert (record["backend"], record["engine_hash"]) == ("onnxruntime", report["engine_hash"])
    assert record["weights_hash"] == report["weights_hash"]

    # the folder itself is a model, anywhere, and a sidecar works on it
    moved = Path("moved").absolute()
    shutil.copytree(folder, moved)
    sidecar = ("--from-sidecar", "one/a-dog-0.json")
    second = cli("generate", *sidecar, "--model", moved, "--out", "two")
    assert second.code == 0, second.err
    assert Path("one/a-dog-0.png").read_bytes() == Path("two/a-dog-0.png").read_bytes()
    cli("generate", *options, "--model", moved, "--backend", "eager").failed(4, "onnxruntime")

    # an engine that exists needs --force, and a damaged one is never opened
    build("--out", moved).failed(3, "--force")
    graph = moved / report["graphs"]["vae_decoder"]["file"]
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    cli("generate", *options, "--model", moved, "--out", "three").failed(6, graph.name)
    assert not Path("three").exists()

    # without the backend, generate says what brings it
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    missing = cli("generate", *options, "--model", random_checkpoint, "--out", "four")
    missing.failed(4, "hcma-fast[")
