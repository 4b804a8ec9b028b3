"""The ``hcma-fast`` command: sub-commands, and what every failure looks like to the user."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from hcma_fast import __version__
from hcma_fast.cli.bench import bench_app
from hcma_fast.cli.build import build
from hcma_fast.cli.cache import cache_app
from hcma_fast.cli.doctor import doctor
from hcma_fast.cli.eval import evaluate
from hcma_fast.cli.generate import generate
from hcma_fast.cli.options import PLAIN_HELP
from hcma_fast.cli.output import print_error, print_note
from hcma_fast.cli.train import train_app
from hcma_fast.errors import DeviceMemoryError, HcmaError, OutputError

DEBUG_VARIABLE = "HCMA_FAST_DEBUG"
_INTERRUPTED = 130

app = typer.Typer(
    name="hcma-fast",
    help="Compile and run HCMA: images from a caption and boxes.",
    no_args_is_help=True,
    rich_markup_mode=PLAIN_HELP,
    # the errors below replace typer's tracebacks
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(short_help="Compile a model to an engine folder, checked against torch.")(build)
app.command(short_help="Generate images from captions and boxes.")(generate)
app.command("eval")(evaluate)
app.command(short_help="Show versions, backends, the GPU and the engine cache.")(doctor)
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
app.add_typer(train_app, name="train")


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
        print_note(record.getMessage())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (design.md section 5).

    Args:
        argv: the arguments after the program's name; default those of the process.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="hcma-fast")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        return _report(error)
    return 0


def _report(error: Exception) -> int:
    """Say what failed in one line; returns the exit code."""
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        traceback.print_exception(error)
    known = _as_known(error)
    if known is None:
        print_error(
            f"this is a bug in hcma-fast: {type(error).__name__}: {error}. Please report it, "
            f"with the traceback that {DEBUG_VARIABLE}=1 in the environment shows."
        )
        return 1
    print_error(str(known))
    return known.exit_code


def _as_known(error: Exception) -> HcmaError | None:
    if isinstance(error, HcmaError):
        return error
    if isinstance(error, MemoryError):
        return DeviceMemoryError("the host is out of memory", remedy="Lower --batch-size.")
    # an OSError without errno comes from a library's own check, so it says nothing of the disk
    if isinstance(error, OSError) and error.errno is not None:
        return OutputError.from_os(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
