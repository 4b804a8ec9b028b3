"""docs/cli.md is the help of the commands, whatever the terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hcma_fast.cli import reference

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    reference.main()
    printed = capsys.readouterr().out
    assert printed == PAGE.read_text(), f"run python -m {reference.__name__} > docs/cli.md"
    names = re.findall(r"^## (.*)$", printed, re.MULTILINE)
    assert {"hcma-fast generate", "hcma-fast bench run", "hcma-fast train aligner"} < set(names)
    # each block is of its heading's command
    usages = re.findall(r"Usage: (hcma-fast(?: [a-z-]+)*) ", printed)
    assert names == usages
    assert printed.count("-h, --help") == len(names)
