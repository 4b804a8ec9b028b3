"""Help that can be read on a terminal of 80 columns, and says what happens without an option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from hcma_fast.cli.app import app
from hcma_fast.cli.verbs import VERBS

#: options that mean nothing at all when they are left out
WITHOUT_DEFAULT = {
    "generate": {"--prompt", "--box", "--layout", "--input", "--from-sidecar"},
    "build": {"--verify"},
    "eval": {"--manifest", "--export", "--scores"},
    "bench run": {"--out"},
    "bench soak": {"--out"},
    "bench quality": {"--grid"},
    "bench kernels": {"--markdown"},
    "cache prune": {"--older-than"},
    "train aligner": {"--sample-data"},
}


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command and group below ``command`` by its words."""
    yield " ".join(path), command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))
LEAVES = [name for name, command in COMMANDS.items() if not hasattr(command, "commands")]


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_all_commands_are_looked_at() -> None:
    assert {"generate", "build", "bench run", "cache prune", "train tune-alignment"} < set(LEAVES)


def test_the_list_of_commands_is_that_of_the_commands() -> None:
    for name, verb in VERBS.items():
        command = COMMANDS[name]
        assert command.name == name and not command.hidden
        assert command.get_short_help_str(limit=80) == verb.short_help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_loses_nothing(
    cli: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = cli(*name.split(), "--help")
    assert result.code == 0, result.err
    usage, *lines = result.out.splitlines()
    assert all(len(line) <= 80 for line in [usage, *lines])
    # a description is cut with dots where it does not fit
    assert not [line for line in lines if line.endswith(("...", "…"))]
    shown = squeezed(result.out)
    command = COMMANDS[name]
    assert squeezed(command.help) in shown
    for parameter in command.params:
        assert squeezed(parameter.help or "") in shown
    # texts have more than half of the line
    starts = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    assert max(starts) <= 34


@pytest.mark.parametrize("name", LEAVES)
def test_an_option_says_what_its_default_is(name: str) -> None:
    silent = set()
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name != "option" or parameter.required:
            continue
        assert parameter.help and "[" not in parameter.help, "defaults belong to show_default"
        switch = parameter.is_flag and not parameter.secondary_opts
        known = isinstance(parameter.show_default, str) or parameter.default not in (None, "")
        if not switch and not known:
            silent.add(parameter.opts[0])
    assert silent == WITHOUT_DEFAULT.get(name, set())


def test_what_several_commands_ask_for_is_asked_in_the_same_words() -> None:
    """By one definition: of a request's fields, or in ``cli/options.py``."""
    commands = [name for name in LEAVES if name.startswith(("generate", "build", "eval", "bench"))]
    for flag in ("--steps", "--seed", "--aligner", "--precision", "--batch-size"):
        texts = {
            parameter.help: name
            for name in commands
            for parameter in COMMANDS[name].params
            if flag in parameter.opts
        }
        assert len(texts) == 1, (flag, texts)


def test_defaults_of_training_are_those_of_the_settings() -> None:
    from hcma_fast.train.aligner.settings import TINY, AlignerTraining
    from hcma_fast.train.denoiser.settings import DenoiserTraining

    def check(command: str, first: Any, tiny: Any) -> int:
        checked = 0
        for parameter in COMMANDS[command].params:
            if parameter.name not in vars(tiny) or parameter.name in ("max_steps", "eta0"):
                continue
            given, wanted = parameter.default, getattr(first, parameter.name)
            if given is not None:
                assert given == wanted, parameter.name
                continue

            def word(value: Any, parameter: Any = parameter) -> str:
                if isinstance(value, bool):
                    chosen = parameter.opts if value else parameter.secondary_opts
                    return str(chosen[0]).removeprefix("--")
                return "none" if value is None else f"{value:g}"

            paper, small = (word(getattr(settings, parameter.name)) for settings in (first, tiny))
            expected = paper if paper == small else f"{paper}; tiny {small}"
            assert parameter.show_default == expected, parameter.name
            checked += 1
        return checked

    assert check("train aligner", AlignerTraining(), TINY) == 13
    assert check("train denoiser", DenoiserTraining(), DenoiserTraining()) == 16
