"""Runs the cases in interpreted/ in a process of their own, with Triton's interpreter.

TRITON_INTERPRET must be set before Triton is imported, and would reach every other test of the
process: hence the other process, and names that pytest does not collect by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")


def test_kernels_agree_with_their_references_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    settings = {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join((str(FOLDER), str(FOLDER.parents[1] / "shared"))),
        "PYTHONSAFEPATH": "1",
        "PYTEST_ADDOPTS": "",
    }
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "interpreter_rules"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", *options),
            *("-c", str(FOLDER.parents[2] / "pyproject.toml")),
            *map(str, sorted(FOLDER.glob("cases_*.py"))),
        ],
        cwd=tmp_path,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
