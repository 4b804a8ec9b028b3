"""What benchmarks with scorers of their own need: images under their names, their scores back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import ValidationError

from hcma_fast.bench.quality.generate import RunSettings, image_files, load_records
from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.methods.table import Method
from hcma_fast.bench.quality.scores import EvalReport
from hcma_fast.bench.shared.bootstrap import Estimate
from hcma_fast.errors import InputError, OutputError, UsageError
from hcma_fast.files import make_folder, read_file, write_whole

_Source = TypeVar("_Source")


@dataclass(frozen=True)
class Scores:
    """What a scorer outside of this package found; it gives no intervals."""

    values: dict[str, float]
    source: str
    """its file and hash, in words"""


class Benchmark(Protocol):
    """Layouts, and the form in which their scorer takes images and gives scores."""

    @property
    def title(self) -> str:
        """What reports call it."""
        ...

    @property
    def items(self) -> list[EvalItem]:
        """All layouts."""
        ...

    def export(
        self, methods: Sequence[Method], run: RunSettings, out: Path, folder: Path, *, force: bool
    ) -> None:
        """Write the run's images into ``folder`` as the scorer reads them."""
        ...

    def read_scores(self, path: Path, run: RunSettings) -> Scores:
        """Read a file that the scorer wrote about one method's images."""
        ...


def export_images(
    methods: Sequence[Method],
    items: Sequence[EvalItem],
    run: RunSettings,
    out: Path,
    folder_of: Callable[[Method], Path],
    name_of: Callable[[EvalItem], str],
    *,
    force: bool,
) -> None:
    """The methods' images, a folder each.

    Args:
        out: folder of the run.

    Raises:
        InputError: images are missing, before the first is written. OutputError: see
            :func:`export_folder`.
    """
    for method in methods:
        load_records(out, method, items, run)
    for method in methods:
        sources = {name_of(item): image_files(out, method, item)[0] for item in items}
        export_folder(folder_of(method), sources, Path.read_bytes, force=force)


def export_folder(
    folder: Path,
    sources: Mapping[str, _Source],
    read: Callable[[_Source], bytes],
    *,
    force: bool,
) -> None:
    """Make ``folder`` hold exactly these files: scorers take all that they find there.

    Args:
        sources: name of each file -> what ``read`` makes its content of.

    Raises:
        OutputError: it holds a file of another name, or, without ``force``, of other content.
    """
    make_folder(folder)
    strange = sorted({path.name for path in folder.iterdir()} - sources.keys())
    if strange:
        raise OutputError(
            "the folder has a file that is not of this run, and the scorer would take it",
            value=str(folder / strange[0]),
            remedy="Give an empty folder.",
        )
    for name, source in sources.items():
        write_document(folder / name, read(source), force=force)


def write_document(path: Path, content: bytes, *, force: bool) -> None:
    """Write a file unless it is there already.

    Raises:
        OutputError: it is there with other content, and no ``force``; or it cannot be written.
    """
    make_folder(path.parent)
    if path.exists() and not force:
        if read_file(path, "this file") == content:
            return
        raise OutputError(
            "this file exists already, and is of another run",
            value=str(path),
            remedy="Use --force to replace it, or give another folder.",
        )
    write_whole(path, lambda file: file.write(content))


def not_in_format(error: ValidationError, what: str, path: Path, remedy: str) -> InputError:
    """The error for a file that pydantic refused, with the place in it."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return InputError(f"{what}: {where}: {first['msg']}", value=str(path), remedy=remedy)


def split_scores(text: str, methods: Sequence[Method]) -> tuple[str, Path]:
    """METHOD=FILE to the method's label and the file; labels hold "=" themselves.

    Raises:
        UsageError: no method of the run, or no file.
    """
    labels = sorted((method.label for method in methods), key=len, reverse=True)
    for label in labels:
        if text.startswith(f"{label}=") and len(text) > len(label) + 1:
            return label, Path(text[len(label) + 1 :])
    raise UsageError(
        "scores read METHOD=FILE, with a method of this run",
        value=text,
        remedy=f"Methods of this run: {', '.join(labels)}.",
    )


def with_scores(report: EvalReport, scores: Sequence[tuple[str, Scores]]) -> EvalReport:
    """The report with the scores of each label added to its row, and where they come from."""
    rows, titles = list(report.methods), dict(report.titles)
    for label, found in scores:
        index = next(i for i, row in enumerate(rows) if row.method == label)
        added = {name: Estimate(value=value) for name, value in found.values.items()}
        rows[index] = rows[index].model_copy(update={"scores": {**rows[index].scores, **added}})
        key = f"scores of {label}"
        titles[key] = ", ".join(filter(None, [titles.get(key), found.source]))
    return report.model_copy(update={"methods": rows, "titles": titles})
