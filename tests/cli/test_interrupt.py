"""Ctrl-C and kill -9 while images are made: every file that is left is whole."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Start = Callable[..., "subprocess.Popen[str]"]


# a process that is killed for good writes as one that is interrupted does, under temporary names
# (tests/test_files.py), and leaves less
@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_leaves_whole_files(
    start: Start, random_checkpoint: Path, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(
        *("generate", "--prompt", "a dog", "--box", "dog:0,0,0.5,1", "--overlay"),
        *("--model", random_checkpoint, "--backend", "eager", "--out", out, "--steps", 2),
        *("--seed", 0, "--num-images", 1000, "--batch-size", 1),
    )
    try:
        while process.poll() is None and not (out / "a-dog-1.json").exists():
            time.sleep(0.02)
        process.send_signal(how)
        stdout, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    left = [path for path in out.iterdir() if path.suffix != ".part"]
    for path in left:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        else:
            record = json.loads(path.read_text())
            content = (out / record["image"]).read_bytes()
            assert record["image_sha256"] == hashlib.sha256(content).hexdigest()
            assert path.with_name(f"{path.stem}-overlay.png") in left
    assert len(left) >= 6
    if how == signal.SIGINT:
        assert not list(out.glob(".*"))


def test_an_interrupt_before_the_first_image_leaves_nothing(
    start: Start, random_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    process = start(
        *("generate", "--prompt", "a", "--model", random_checkpoint, "--backend", "eager"),
        *("--out", out, "--steps", 999, "--num-images", 100, "--batch-size", 100),
    )
    try:
        while process.poll() is None and not out.exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not out.parent.exists()
