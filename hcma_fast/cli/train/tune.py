"""``hcma-fast train tune-alignment``: search for a checkpoint's eta0, window and lambdas."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from filelock import FileLock, Timeout
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hcma_fast.cli.options import DEFAULT_STEPS, AsTable, Backend, BatchSize, Steps
from hcma_fast.cli.output import (
    BuildProgress,
    output_folder,
    print_json,
    print_note,
    stderr,
)
from hcma_fast.config import PRESETS, cache_root
from hcma_fast.errors import HcmaError, OutputError, UsageError
from hcma_fast.files import new_folder, write_file

if TYPE_CHECKING:
    from hcma_fast.bench.quality.tuning.records import TuningReport
    from hcma_fast.models.checkpoint.info import CheckpointInfo

#: about a factor of 100 around tiny's best; a normalized step is a share of the latent's norm
_RANGES = {False: (1.0, 200.0), True: (0.001, 0.3)}


def _shown_ranges() -> str:
    plain, normalized = ("{:g} {:g}".format(*_RANGES[mode]) for mode in (False, True))
    return f"{plain}; normalized {normalized}"


def tune_alignment(
    model: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}, or a folder.")] = "tiny",
    backend: Backend = "onnxruntime",
    score: Annotated[
        Literal["recognised", "confidence"],
        typer.Option(
            help="Share of large boxes that the judge recognises, or its log-probability of what "
            "was asked for, in all boxes."
        ),
    ] = "confidence",
    trials: Annotated[
        int, typer.Option(min=1, help="Settings to try, those of a stopped search included.")
    ] = 20,
    count: Annotated[int, typer.Option(min=1, help="Layouts of a trial, an image each.")] = 100,
    confirm: Annotated[
        int | None,
        typer.Option(
            min=1, help="Fresh layouts for the last comparison.", show_default="as many as --count"
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Start no trial after so many seconds.", show_default="no limit"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of search and first image.")] = 0,
    steps: Steps = DEFAULT_STEPS,
    batch_size: BatchSize = 10,
    chunk: Annotated[
        int, typer.Option(min=1, help="Layouts after which a hopeless trial may stop.")
    ] = 40,
    eta0_range: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Range of eta0.", show_default=_shown_ranges()),
    ] = None,
    normalized: Annotated[
        bool | None,
        typer.Option(
            "--normalized/--plain",
            help="Is eta a share of the latent's norm?",
            show_default="as the checkpoint has it",
        ),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the winner into --model.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Put it into a copy of the model; a new folder.", show_default="none"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even if it is not shown to beat no alignment.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder for trials.csv, trials.json, curve.png.",
            show_default="the search's own, in --work",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Where the search is kept, to go on after a stop.",
            show_default="the user's cache",
        ),
    ] = None,
    json_: AsTable = False,
) -> None:
    """Search eta0, window and lambdas on held-out scenes, by what the judge sees.

    The winner is compared with no alignment on fresh layouts. Without --write or --out it is only
    shown; nothing is written unless the interval of its gain is above 0, or with --force.
    """
    from hcma_fast.bench.quality.metrics.judge.model import Judge
    from hcma_fast.bench.quality.tuning.files import tuning_table
    from hcma_fast.bench.quality.tuning.judge_score import JudgeScore, check_emoji_scenes
    from hcma_fast.bench.quality.tuning.records import Plan
    from hcma_fast.bench.quality.tuning.search import check_installed, search
    from hcma_fast.models.checkpoint.info import (
        CheckpointInfo,
        check_safe,
        read_info,
        resolve_folder,
    )
    from hcma_fast.runtime.pipeline import HCMAPipeline

    check_installed()
    folder = resolve_folder(model)
    check_safe(folder)
    info = read_info(folder) or CheckpointInfo()
    check_emoji_scenes(info.preset)
    _check_targets(model, folder, write, out)
    own = info
    if normalized is not None:
        mode = info.alignment.model_copy(update={"normalized": normalized})
        info = info.model_copy(update={"alignment": mode})
    plan = Plan(
        base=info.alignment,
        eta0_range=eta0_range or _RANGES[info.alignment.normalized],
        count=count,
        confirm=confirm or count,
        chunk=chunk,
        seed=seed,
        score=score,
    )
    judge = Judge.load()
    root = work or cache_root() / "tune-alignment"
    with output_folder(root):
        source = folder if info == own else _variant(folder, info, root)
        with BuildProgress(
            "Building engines, once for this model; the next run finds them in the cache."
        ) as building:
            pipe = HCMAPipeline.from_pretrained(source, backend=backend, progress=building)
        key = [plan.model_dump_json(), pipe.weights_hash, pipe.engine_hash, backend]
        key += [judge.card.sha256, str(steps), str(batch_size)]
        place = root / hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:16]
        scorer = JudgeScore(
            pipe,
            judge,
            seed=seed,
            batch_size=batch_size,
            num_inference_steps=steps,
            work=place / "images",
        )
        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with (
            _only_user(place),
            Progress(
                *Progress.get_default_columns()[:2],
                *columns,
                console=stderr,
                redirect_stdout=False,
            ) as bars,
        ):
            found = search(
                scorer, plan, place, trials=trials, timeout=timeout, progress=_Bars(bars)
            )
    _write_report(found, report or place)
    if json_:
        print_json(found.model_dump(mode="json"))
    else:
        typer.echo(tuning_table(found))
    if write or out is not None:
        _keep(found, folder, info, out, force)


def _check_targets(model: str, folder: Path, write: bool, out: Path | None) -> None:
    """Refuse, before anything starts, a target that must not or cannot be written."""
    if write and out is not None:
        raise UsageError(
            "--write changes the model itself, --out a copy", value=str(out), remedy="Give one."
        )
    own = {path.resolve() for path in PRESETS.values()}
    if write and (folder.resolve() in own or not Path(model).expanduser().is_dir()):
        raise UsageError(
            "--write changes a folder of yours only, not the installed package or the hub's cache",
            value=model,
            remedy="Use --out FOLDER for a copy with the winner's settings.",
        )
    if write and not os.access(folder, os.W_OK):
        raise OutputError(
            "the model's folder cannot be written", value=str(folder), remedy="Use --out FOLDER."
        )
    if out is not None and out.exists():
        raise OutputError(
            "this folder exists already", value=str(out), remedy="Give --out a new folder."
        )


def _variant(folder: Path, info: CheckpointInfo, root: Path) -> Path:
    """A copy of the checkpoint with other defaults: the align graph has the mode compiled in."""
    from hcma_fast.models.checkpoint.info import hash_weights

    digest = hash_weights(folder, folder / "aligner")[:16]
    copy = root / f"{digest}-{'normalized' if info.alignment.normalized else 'plain'}"
    if not copy.exists():
        _copy(folder, info, copy)
    return copy


def _copy(folder: Path, info: CheckpointInfo, target: Path) -> None:
    """Copy a checkpoint with ``info`` in it, whole or not at all."""
    from hcma_fast.models.checkpoint.info import write_info

    with new_folder(target) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        write_info(partial, info)


@contextmanager
def _only_user(place: Path) -> Iterator[None]:
    """Two processes on one study would try the same settings, and remove each other's images."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / "lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(
            "another process runs this search", value=str(place), remedy="Wait for it to end."
        ) from error


class _Bars:
    """Progress on stderr, a bar per setting."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total)
        self._progress.update(self._tasks[label], completed=done, total=total)


def _write_report(found: TuningReport, folder: Path) -> None:
    from hcma_fast.bench.quality.tuning.files import plot_png, trials_csv

    with output_folder(folder):
        write_file(folder / "trials.json", (found.model_dump_json(indent=2) + "\n").encode())
        write_file(folder / "trials.csv", trials_csv(found).encode())
        write_file(folder / "curve.png", plot_png(found))
    print_note(f"trials.csv, trials.json and curve.png are in {folder}")


def _keep(
    found: TuningReport, folder: Path, info: CheckpointInfo, out: Path | None, force: bool
) -> None:
    """Write the winner's settings into the model or a copy of it."""
    from hcma_fast.models.checkpoint.info import write_info

    if found.settings is None or (found.verdict != "better" and not force):
        raise HcmaError(
            "nothing was written: no setting is shown to beat no alignment",
            value=found.verdict,
            remedy="Search longer (--trials, --count, --confirm), or write the best with --force."
            if found.settings
            else "All trials diverged: lower --eta0-range.",
        )
    chosen = info.model_copy(update={"alignment": found.settings})
    if out is not None:
        _copy(folder, chosen, out)
    else:
        write_info(folder, chosen)
    print_note(
        f"wrote the settings of trial {found.best} into {out or folder} (engines of compiled "
        "backends are built again for it)"
    )
