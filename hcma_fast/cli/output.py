"""What commands print and write: messages on stderr, files whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from hcma_fast.errors import OutputError, printable

#: progress and messages; stdout carries data only
stderr = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """One line of at most 500 characters on stderr; the message is not taken for rich markup."""
    stderr.print(Text.assemble(("error: ", "bold red"), printable(message)), soft_wrap=True)


def print_note(message: str) -> None:
    """One line of information on stderr, of at most 500 characters."""
    stderr.print(Text(printable(message)), soft_wrap=True)


def print_json(data: Any) -> None:
    """JSON on stdout, indented, ASCII only so that any terminal encoding takes it."""
    typer.echo(json.dumps(data, indent=2))


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Make ``folder`` and prove that it can be written; after a failure, empty new ones go again.

    Raises:
        OutputError: it cannot be made or written.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".hcma-fast.{os.getpid()}.part"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputError.from_os(error, folder) from error
        yield folder
    except BaseException:
        for path in created:
            with suppress(OSError):
                path.rmdir()
        raise


def counting_bar() -> Progress:
    """A bar on stderr that counts items, with the time gone and left."""
    return Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        redirect_stdout=False,
    )


class BuildProgress:
    """Shows (graph, stage) reports of a build on stderr; silent until the first one comes.

    On a terminal a line per graph with its stage and the time, else a plain line per report.
    """

    def __init__(self, announcement: str) -> None:
        self._announcement = announcement
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    @property
    def started(self) -> bool:
        """Has a report come?"""
        return self._progress is not None

    def __enter__(self) -> BuildProgress:
        return self

    def __call__(self, graph: str, stage: str) -> None:
        """A report: ``stage`` is "export", "compile", "validate" or "done"."""
        if self._progress is None:
            print_note(self._announcement)
            self._progress = Progress(
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description:<14}"),
                TextColumn("{task.fields[stage]:<9}"),
                TimeElapsedColumn(),
                console=stderr,
                disable=not stderr.is_terminal,
                redirect_stdout=False,
            )
            self._progress.start()
        if not stderr.is_terminal:
            print_note(f"{graph}: {stage}")
        if graph not in self._tasks:
            self._tasks[graph] = self._progress.add_task(graph, total=1, stage=stage)
        self._progress.update(
            self._tasks[graph], stage=stage, completed=1 if stage == "done" else 0
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
