"""``hcma-fast train tune-alignment``: a real search, its files, and what it refuses to write."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hcma_fast.config import PRESETS
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.models.checkpoint.info import CheckpointInfo, read_info, write_info

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def scenes_checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A random checkpoint that says it draws EmojiScenes."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, folder)
    info = read_info(folder)
    assert info is not None
    write_info(folder, info.model_copy(update={"preset": "tiny"}))
    return folder


@pytest.mark.slow
def test_a_real_search(start: Start, scenes_checkpoint: Path, tmp_path: Path) -> None:
    before = (scenes_checkpoint / "hcma.json").read_bytes()
    command = [
        *("train", "tune-alignment", "--model", scenes_checkpoint, "--backend", "eager"),
        *("--trials", 2, "--count", 4, "--confirm", 4, "--chunk", 2, "--steps", 4),
        *("--eta0-range", 0.1, 2, "--report", tmp_path / "report", "--json"),
        *("--score", "recognised"),
    ]
    process = start(*command)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert [trial["number"] for trial in found["trials"]] == [0, 1, 2]
    assert found["trials"][0]["state"] == "off" and found["trials"][1]["eta0"] == 0.5
    assert json.loads((tmp_path / "report" / "trials.json").read_text()) == found
    assert (tmp_path / "report" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "report" / "trials.csv").read_text().splitlines()) == 4
    assert found["plan"]["score"] == "recognised" and found["recognised"] is None
    # only shown
    assert (scenes_checkpoint / "hcma.json").read_bytes() == before

    # the random model is no better with any setting, so only --force writes
    copy = tmp_path / "tuned"
    process = start(*command, "--out", copy)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "nothing was written" in err and not copy.exists()
    assert {**json.loads(out), "date": ""} == {**found, "date": ""}
    process = start(*command, "--out", copy, "--force")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert load_components(copy).settings.model_dump(mode="json") == found["settings"]
    assert (scenes_checkpoint / "hcma.json").read_bytes() == before
    process = start(*command, "--write", "--force")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert load_components(scenes_checkpoint).settings == load_components(copy).settings

    # by default another score is maximised, which is another search
    process = start(*command[:-2], "--model", copy)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    other = json.loads(out)
    assert other["plan"]["score"] == "confidence" and other["recognised"]["images"] > 0
    assert all(trial["comparison"]["score"] < 0 for trial in other["trials"])


def test_the_installed_package_and_existing_folders_are_not_written(
    cli: Any, tmp_path: Path
) -> None:
    run = ("train", "tune-alignment", "--model")
    for model in ("tiny", PRESETS["tiny"]):
        cli(*run, model, "--write").failed(2, "installed package", "--out")
    cli(*run, "tiny", "--out", tmp_path).failed(3, "exists already")
    cli(*run, "tiny", "--out", "x", "--write").failed(2, "--write")


def test_other_checkpoints_are_refused(
    cli: Any, random_checkpoint: Path, scenes_checkpoint: Path
) -> None:
    run = ("train", "tune-alignment", "--model")
    cli(*run, random_checkpoint).failed(2, "EmojiScenes", "random")
    write_info(scenes_checkpoint, CheckpointInfo())
    cli(*run, scenes_checkpoint).failed(2, "EmojiScenes", "sd14")
