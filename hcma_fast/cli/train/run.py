"""What the commands that train share: options, settings, bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

from hcma_fast.cli.output import stderr
from hcma_fast.errors import UsageError

if TYPE_CHECKING:
    from hcma_fast.train.loop.settings import Training

Out = Annotated[
    Path, typer.Option(help="Folder of the run; one that was stopped goes on where it was.")
]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Products in bfloat16.")]
MaxSteps = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many.", show_default="no limit")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read the cache.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps; also at an epoch's end.", show_default="500")
]
Keep = Annotated[int | None, typer.Option(min=1, help="States to keep.", show_default="2")]
Tensorboard = Annotated[bool, typer.Option(help="Write TensorBoard's events too.")]
SampleEvery = Annotated[
    int | None,
    typer.Option(min=1, help="Draw some val layouts every so many steps.", show_default="never"),
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave GPUs alone.")]
#: what the stages' settings of the same name have in common, whatever their defaults are
_SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "epochs": ((), {"min": 1, "help": "Passes over the images."}),
    "batch": ((), {"min": 1, "help": "Images a step, all processes."}),
    "micro_batch": ((), {"min": 1, "help": "Images that a process takes at once."}),
    "lr": ((), {"min": 0, "help": "Learning rate."}),
    "weight_decay": ((), {"min": 0, "help": "How fast weights shrink."}),
    "decoupled_decay": (("--decoupled-decay/--l2-decay",), {"help": "AdamW, or Adam."}),
    "warmup": ((), {"min": 0, "help": "Steps of warm-up."}),
    "cosine": (("--cosine/--constant",), {"help": "Decay of the learning rate."}),
    "clip_norm": ((), {"min": 0, "help": "Largest norm of the gradient."}),
    "ema_decay": ((), {"min": 0, "max": 1, "help": "Average of weights; 0 for none."}),
    "log_every": ((), {"min": 1, "help": "Steps."}),
}


def setting(name: str, default: str) -> Any:
    """The option of a setting that every stage has, for an ``Annotated``.

    Args:
        default: the stage's own, as its help shows it.
    """
    switches, keywords = _SETTINGS[name]
    return typer.Option(*switches, **keywords, show_default=default)


_Settings = TypeVar("_Settings", bound="Training")


def training_settings(base: _Settings, given: Mapping[str, object], command: str) -> _Settings:
    """``base`` with what was given on the command line; None stands for an option left out.

    Args:
        given: a command's parameters by name; those that are no settings are not looked at.
        command: whose help has more to say.

    Raises:
        UsageError: a value is out of its range; names the option.
    """
    from pydantic import ValidationError

    settings = base.model_dump()
    given = {name: given[name] for name in settings if given.get(name) is not None}
    settings |= given
    if "batch" in given and "micro_batch" not in given:
        settings["micro_batch"] = min(base.micro_batch, base.batch, int(str(given["batch"])))
    try:
        return type(base).model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"--{'-'.join(str(part) for part in first['loc']).replace('_', '-')}: {first['msg']}",
            value=first["input"],
            remedy=f"See hcma-fast train {command} --help.",
        ) from error


class _Rate(ProgressColumn):
    """What is done a second."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def training_bar() -> Progress:
    """A bar on stderr with the rate, the time left and a note."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=stderr,
        redirect_stdout=False,
    )


class StepBar:
    """Takes a stage's reports; a bar in the main process only, since it is the one that reports."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: list[TaskID] = []

    def __call__(self, done: int, total: int, record: dict[str, object] | None) -> None:
        """Steps done, steps in all, and the record where one was logged."""
        if not self._tasks:
            task = self._progress.add_task("steps", total=total, note="", completed=done - 1)
            self._tasks.append(task)
        self._progress.update(self._tasks[0], completed=done)
        if record is not None:
            self._progress.update(
                self._tasks[0],
                note=f"loss {record['loss']:.4f}  {record['samples_per_second']:.0f} images/s",
            )
