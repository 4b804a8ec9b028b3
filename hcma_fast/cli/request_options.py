"""Command-line options for the fields of a request, made from the fields themselves.

A field's description, bounds and type become the option's help, limits and type. Settings are
options of their own; savings are NAME=VALUE pairs of one option.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Optional, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from hcma_fast.config import Asked, Settings
from hcma_fast.runtime.request import Request
from hcma_fast.sampling.savings import Savings, parse_savings


@dataclass(frozen=True)
class FieldOption:
    """The option of one field."""

    path: tuple[str, ...]
    """names of the field: ("seed",) or ("settings", "eta0")"""
    field: FieldInfo
    default: str
    """what the help says of the default"""

    @property
    def asked(self) -> Asked:
        """How it is asked for."""
        return _asked(self.field)

    @property
    def flag(self) -> str:
        """Such as ``--align-window``."""
        return self.asked.option or "--" + self.path[-1].replace("_", "-")

    @property
    def name(self) -> str:
        """Of the command's argument, which typer makes the flag from."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def is_savings(self) -> bool:
        """NAME=VALUE pairs."""
        return self.field.annotation is Savings

    def option(self, *, default: bool = False) -> Any:
        """typer's option; ``default``: the command has a default of its own, which it shows."""
        return typer.Option(
            metavar=self.asked.metavar,
            help=self.field.description,
            show_default=True if default else self.default,
            min=_bound(self.field, "ge"),
            max=_bound(self.field, "le"),
        )

    def parameter(self) -> inspect.Parameter:
        """The command's argument: None where the option is left out."""
        kind: Any = list[str] if self.is_savings else _plain(self.field.annotation)
        required = self.field.is_required()
        option = self.option() if not required else typer.Option(help=self.field.description)
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Optional[kind], option],  # noqa: UP045 (a type made at run time)
        )


def request_options(request_type: type[Request] = Request) -> list[FieldOption]:
    """The options of a request, those of its settings among them, in the order of the fields."""
    return list(_options(request_type))


def _options(
    model: type[Settings], path: tuple[str, ...] = (), default: str = ""
) -> Iterator[FieldOption]:
    for name, field in model.model_fields.items():
        if _asked(field).option is None:
            continue
        kind = field.annotation
        said = _asked(field).default or default or str(field.default)
        if isinstance(kind, type) and issubclass(kind, Settings) and kind is not Savings:
            yield from _options(kind, (*path, name), said)
        else:
            yield FieldOption((*path, name), field, said)


def field_option(name: str, request_type: type[Request] = Request) -> Any:
    """typer's option for one field, of a command that has a default of its own for it."""
    return next(o for o in request_options(request_type) if o.path[-1] == name).option(default=True)


def request_values(
    arguments: Mapping[str, Any], request_type: type[Request] = Request
) -> dict[str, Any]:
    """Values of a request from the command's arguments, without those that were left out.

    Raises:
        UsageError: a saving does not read NAME=VALUE.
    """
    values: dict[str, Any] = {}
    for option in request_options(request_type):
        given = arguments[option.name]
        if option.is_savings:
            given = parse_savings(given) if given else None
        if given is None:
            continue
        *groups, name = option.path
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = given
    return values


def with_request_options(
    command: Callable[..., None], request_type: type[Request] = Request
) -> Callable[..., None]:
    """The command with an option for every field of a request, the first ones in its help.

    Args:
        command: takes them as ``**arguments``, and ``request_type``.
    """
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name != "request_type"
    ]
    made = [option.parameter() for option in request_options(request_type)]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        command(request_type=request_type, **arguments)

    run.__name__ = command.__name__.removeprefix("_")
    # typer reads it in place of the function's own
    run.__signature__ = inspect.Signature([*made, *own])  # type: ignore[attr-defined]
    return run


def _asked(field: FieldInfo) -> Asked:
    return next((mark for mark in field.metadata if isinstance(mark, Asked)), Asked())


def _bound(field: FieldInfo, name: str) -> float | None:
    """The field's bound ``ge`` or ``le``, if it has one."""
    found: float | None = next(
        (getattr(mark, name) for mark in field.metadata if hasattr(mark, name)), None
    )
    return found


def _plain(kind: Any) -> Any:
    """A type without what pydantic adds to it."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if get_origin(kind) is tuple:
        return tuple[tuple(_plain(part) for part in get_args(kind))]  # type: ignore[misc]
    return kind
