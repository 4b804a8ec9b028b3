"""The commands of ``hcma-fast``: a module is imported when its command is asked for, not before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from hcma_fast.cli.hints import HintedCommand

#: typer's rich_markup_mode. Its boxes leave a text 18 of 80 columns, and lose words in brackets
PLAIN_HELP: None = None


@dataclass(frozen=True)
class Verb:
    """Where a command is, and its line in the help of ``hcma-fast``."""

    module: str
    #: a function, or a ``typer.Typer`` with commands of its own
    attribute: str
    short_help: str
    cls: type[TyperCommand] = TyperCommand


VERBS = {
    "build": Verb(
        "hcma_fast.cli.build",
        "build",
        "Compile a model to an engine folder, checked against torch.",
    ),
    "generate": Verb(
        "hcma_fast.cli.generate.command",
        "generate",
        "Generate images from captions and boxes.",
        HintedCommand,
    ),
    "convert": Verb(
        "hcma_fast.cli.convert",
        "convert",
        "Write a model of any format as a folder of safetensors.",
    ),
    "eval": Verb(
        "hcma_fast.cli.eval.command",
        "evaluate",
        "Compare methods on the same captions, layouts, seeds and steps.",
    ),
    "doctor": Verb(
        "hcma_fast.cli.doctor", "doctor", "Show versions, backends, the GPU and the engine cache."
    ),
    "bench": Verb("hcma_fast.cli.bench.command", "bench_app", "Measure speed and quality."),
    "cache": Verb("hcma_fast.cli.cache", "cache_app", "Engines that were built before."),
    "train": Verb(
        "hcma_fast.cli.train.command", "train_app", "Train the aligner, tune the alignment."
    ),
}


@cache
def _load(name: str) -> Any:
    """The command of this name, as typer's class of commands or groups (private types)."""
    verb = VERBS[name]
    loaded = getattr(import_module(verb.module), verb.attribute)
    # completion is an option of the whole program, not of each command
    parent = typer.Typer(add_completion=False, rich_markup_mode=PLAIN_HELP)
    # with a callback typer keeps it a group even if it has one command
    parent.callback()(lambda: None)
    if isinstance(loaded, typer.Typer):
        parent.add_typer(loaded, name=name, short_help=verb.short_help)
    else:
        parent.command(name, cls=verb.cls, short_help=verb.short_help)(loaded)
    group: Any = typer.main.get_command(parent)
    return group.commands[name]


class _Commands(Mapping[str, Any]):
    """Commands by name, each imported when it is taken."""

    def __getitem__(self, name: str) -> Any:
        if name not in VERBS:
            raise KeyError(name)
        return _load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


class LazyGroup(TyperGroup):
    """A group that lists its commands without importing them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        commands: Any = _Commands()
        self.commands = commands

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of ``VERBS``."""
        return list(VERBS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The section of commands in the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.short_help) for name, verb in VERBS.items()])
