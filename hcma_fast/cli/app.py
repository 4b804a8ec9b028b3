"""The ``hcma-fast`` command: sub-commands, and what they say on the way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from hcma_fast import __version__
from hcma_fast.cli.verbs import PLAIN_HELP, LazyGroup
from hcma_fast.errors import UsageError
from hcma_fast.program import run_program

app = typer.Typer(
    name="hcma-fast",
    cls=LazyGroup,
    help="Compile and run HCMA: images from a caption and boxes.",
    no_args_is_help=True,
    rich_markup_mode=PLAIN_HELP,
    # the errors below replace typer's tracebacks
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hcma-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Data goes to stdout, progress and messages to stderr."""
    log = logging.getLogger("hcma_fast")
    if not log.handlers:
        log.addHandler(_Notes())
    log.setLevel(logging.INFO)


class _Notes(logging.Handler):
    """What the library has to say (which backend and why, what a cached engine lacks)."""

    def emit(self, record: logging.LogRecord) -> None:
        from hcma_fast.cli.output import print_note

        print_note(record.getMessage())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (design.md section 5).

    Args:
        argv: the arguments after the program's name; default those of the process.
    """
    given = None if argv is None else list(argv)
    return run_program(lambda: _run(given), _print_error)


def _print_error(message: str) -> None:
    # rich takes as long to import as all that `--help` needs
    from hcma_fast.cli.output import print_error

    print_error(message)


def _run(args: list[str] | None) -> None:
    """Call the app; what its parser refuses is an error like ours: one line, cut and escaped.

    Raises:
        UsageError: an unknown option or command, or a value that does not parse.
    """
    try:
        code = app(args=args, prog_name="hcma-fast", standalone_mode=False)
    except Exception as error:
        # the parser's kinds are private to typer, and in older versions click's
        describe: Callable[[], str] | None = getattr(error, "format_message", None)
        if describe is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(describe(), err=True)
            raise SystemExit(2) from error
        context = getattr(error, "ctx", None)
        command = "hcma-fast" if context is None else context.command_path
        what, mark, guess = describe().removesuffix(".").partition(" Did you mean ")
        remedy = f"{mark.strip()} {guess} See {command} -h.".strip()
        raise UsageError(what.removesuffix("."), remedy=remedy) from error
    if isinstance(code, int) and code:
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(main())
