"""docs/cli.md, from the help of every command.

python -m hcma_fast.cli.reference > docs/cli.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from hcma_fast.cli.app import app
from hcma_fast.program import run_program

_COLUMNS = 100
_INTRODUCTION = """# Command line

Written by `python -m hcma_fast.cli.reference > docs/cli.md`: the help of every command, as `--help`
prints it.

Data goes to stdout, messages to stderr. Exit codes: 0 ok, 1 fault of hcma-fast, 2 usage, 3 bad
input, 4 backend missing, 5 out of memory, 6 stale or untrusted engine, 130 interrupted,
143 terminated.
"""


def _contexts(command: Any, name: str, parent: Any = None) -> Iterator[Any]:
    """The context of a command, and of all below it."""
    context = typer.Context(
        command, parent, name, terminal_width=_COLUMNS, **command.context_settings
    )
    yield context
    # typer's class of groups is private
    for word, child in getattr(command, "commands", {}).items():
        yield from _contexts(child, word, context)


def reference() -> str:
    """The page in Markdown: a heading per command, with its help as a block of text."""
    parts = [_INTRODUCTION]
    for context in _contexts(typer.main.get_command(app), "hcma-fast"):
        text = context.get_help().rstrip()
        parts.append(f"## {context.command_path}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Print the page."""
    sys.stdout.write(reference())


if __name__ == "__main__":
    sys.exit(run_program(main))
