"""``hcma-fast cache``: what engines are kept, and which can go."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from hcma_fast.cli.options import AsTable
from hcma_fast.cli.output import print_json, print_note, stderr
from hcma_fast.cli.verbs import PLAIN_HELP
from hcma_fast.config import cache_root

_MIB = 2**20
#: in the name of everything in the cache
_HASH = re.compile("[0-9a-f]{24}")
_SHOWN = 8
cache_app = typer.Typer(
    help="Engines that were built before.", no_args_is_help=True, rich_markup_mode=PLAIN_HELP
)


@cache_app.command("list")
def list_(
    json_: AsTable = False,
) -> None:
    """Show every engine folder in the cache, and if it can still be used."""
    from hcma_fast.export.cache import list_cache

    entries = list_cache()
    if json_:
        print_json([entry.model_dump(mode="json") for entry in entries])
        return
    table = Table(box=box.SIMPLE)
    for column in ("key", "model", "backend", "precision"):
        table.add_column(column, no_wrap=True)
    for column in ("MiB", "days"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for entry in entries:
        known = (entry.preset, entry.backend, entry.precision)
        table.add_row(
            # what tells folders apart; their whole names take half of a line, and are on stdout
            (found[0] if (found := _HASH.search(entry.folder.name)) else "")[:_SHOWN],
            *(value or "" for value in known),
            f"{entry.size_bytes / _MIB:.0f}",
            f"{entry.age_days:.1f}",
            entry.state + (f" ({entry.reason})" if entry.reason else ""),
        )
    stderr.print(table)
    print_note(f"{len(entries)} in {cache_root()}")
    for entry in entries:
        typer.echo(entry.folder)


@cache_app.command(short_help="Remove engines that can no longer be used.")
def prune(
    older_than: Annotated[
        float | None, typer.Option(help="Also those built more than this many days ago.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Remove engines that can no longer be used: of other versions, damaged, or half built."""
    from hcma_fast.export.cache import prune_cache

    for folder in prune_cache(older_than_days=older_than, everything=everything):
        typer.echo(folder)
