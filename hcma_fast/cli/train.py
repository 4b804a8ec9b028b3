"""``hcma-fast train``: from data to weights and their settings."""

from __future__ import annotations

import typer

from hcma_fast.cli.tune import tune_alignment

train_app = typer.Typer(
    help="Train and tune. Tables and JSON on stdout, progress on stderr.", no_args_is_help=True
)
train_app.command("tune-alignment")(tune_alignment)


@train_app.callback()
def _train() -> None:
    # typer makes the only command of an app without a callback the app itself
    pass
