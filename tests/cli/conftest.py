"""Run the command in this process, or as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hcma_fast.cli.app import main

#: a shell starts background jobs (such as a CI run) with SIGINT ignored, and children inherit that
_AS_PROCESS = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from hcma_fast.cli.app import main; sys.exit(main())"
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def failed(self, code: int, *words: str) -> None:
        """It ended with ``code``, said why in one line with ``words``, and nothing on stdout."""
        assert self.code == code, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        line = self.err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        for word in words:
            assert word in line


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """``cli("generate", "--prompt", "x")`` in an empty working folder, with a cache of its own."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HCMA_FAST_DEBUG", raising=False)

    def run(*argv: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command as a process; like ``cli``, but it can be interrupted or killed."""

    def run(*argv: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _AS_PROCESS, *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONSAFEPATH": "1", "HCMA_FAST_CACHE": str(tmp_path / "cache")},
        )

    return run
