"""An interrupted batch goes on: what is there and whole is not made again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hcma_fast.cli.generate import render
from hcma_fast.files import new_folder
from hcma_fast.program import run_program

LINES = [
    {"prompt": "a dog", "id": "one", "seed": 1},
    {"prompt": "a cat", "id": "two"},
    {"prompt": "a cat", "id": "three", "phrases": ["cat"], "boxes": [[0, 0, 1, 1]], "seed": 2**63},
]


def _whole(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_interrupted_batch_goes_on(
    cli: Any, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("in.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    out = Path("out")
    base = (
        *("generate", "--model", random_checkpoint, "--backend", "eager", "--steps", 2),
        *("--input", "in.jsonl", "--out", out, "--batch-size", 1),
    )
    write = render._write

    def stop_at_the_third(job: Any, *rest: Any) -> Any:
        if job.name == "three":
            raise KeyboardInterrupt
        return write(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(render, "_write", stop_at_the_third)
        stopped = cli(*base)
    assert stopped.code == 130 and "2 of 3 images are done, in out" in stopped.err
    assert "--skip-existing" in stopped.err
    before = _whole(out)
    assert len(before) == 4

    # the second line has no seed: any image of it will do
    went_on = cli(*base, "--skip-existing", "--overlay", "--json")
    assert went_on.code == 0, went_on.err
    assert "2 of 3 images are there already" in went_on.err
    entries = json.loads(went_on.out)["images"]
    assert [entry["skipped"] for entry in entries] == [True, True, False]
    after = _whole(out)
    assert {name: after[name] for name in before} == before and len(after) == 9

    # damaged, or without its sidecar, as kill -9 leaves it: made again
    Image.new("RGB", (16, 16)).save(out / "one-1.png")
    (out / f"three-{2**63}.json").unlink()
    again = cli(*base, "--skip-existing", "--json")
    assert [entry["skipped"] for entry in json.loads(again.out)["images"]] == [False, True, False]
    assert _whole(out)["one-1.png"] == before["one-1.png"]

    # other settings under the same name are refused, unless they are to be replaced
    cli(*base, "--skip-existing", "--eta0", 0.1).failed(3, "another settings", "one-1.png")
    forced = cli(*base, "--skip-existing", "--eta0", 0.1, "--force", "--json")
    assert not any(entry["skipped"] for entry in json.loads(forced.out)["images"])
    (out / "one-1.json").write_text("[]")
    cli(*base, "--skip-existing", "--eta0", 0.1).failed(3, "did not write it", "one-1.json")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_terminated_program_cleans_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)

    def main() -> None:
        with new_folder(tmp_path / "engine") as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), number)

    assert run_program(main) == code
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before
