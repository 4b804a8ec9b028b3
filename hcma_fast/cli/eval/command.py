"""``hcma-fast eval``: methods side by side on many layouts; images, measurements, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID

from hcma_fast.cli.eval.inputs import (
    check_benchmark,
    choose_instruments,
    choose_items,
    leave_out_too_few,
)
from hcma_fast.cli.options import (
    DEFAULT_STEPS,
    Aligner,
    AsMarkdown,
    Backend,
    BatchSize,
    Checkpoint,
    Device,
    FirstSeed,
    Steps,
)
from hcma_fast.cli.output import (
    BuildProgress,
    counting_bar,
    output_folder,
    print_json,
    print_note,
)
from hcma_fast.errors import BackendError, OutputError, UsageError
from hcma_fast.files import write_file

if TYPE_CHECKING:
    from hcma_fast.bench.quality.methods.table import Method, Runner

_STAGES = ("generate", "measure", "report")
_REPORTS = ("scores.json", "scores.csv", "report.md", "report.html")
_NEEDED = ("torchmetrics", "scipy", "faster_coco_eval", "matplotlib", "yaml")


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder of the run; a stopped one goes on in it.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="sd, gligen, attend-and-excite, boxdiff, layout-guidance, hcma, hcma-global or "
            "hcma-local, with settings if wanted, such as hcma:eta0=10; repeat it.",
            show_default="gligen, hcma",
        ),
    ] = None,
    model: Checkpoint = "tiny",
    aligner: Aligner = None,
    backend: Backend = "onnxruntime",
    device: Device = None,
    data: Annotated[
        str,
        typer.Option(
            help="emoji-scenes, emoji-scenes:val, coco2014=FOLDER, gligen-coco=FOLDER or "
            "coco-mig=FILE."
        ),
    ] = "emoji-scenes",
    manifest: Annotated[
        Path | None,
        typer.Option(help="JSONL instead of --data: id, prompt, phrases, boxes, mentions, image."),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder below which names of real images may be absolute or have '..'.",
            show_default="names must stay in the manifest's or split's folder",
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out COCO's unusable records, and list them.")
    ] = False,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Layouts.", show_default="500; COCO 30000; a file all"),
    ] = None,
    seed: FirstSeed = 0,
    steps: Steps = DEFAULT_STEPS,
    batch_size: BatchSize = 1,
    attention_factor: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Latent cells per cell of the attention maps that peers guide by.",
            show_default="4 as in the papers, or the UNet's coarsest",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="judge, likeness, fid, kid, precision-recall, clip, detector; repeat it.",
            show_default="all whose networks there are",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Vision model for fid, kid, precision-recall: folder, hub id, or inception=FILE "
            "for FID proper.",
            show_default="the judge, on EmojiScenes",
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP model: folder or hub id.", show_default="none")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="Detector: folder or hub id.", show_default="none")
    ] = None,
    resize_real: Annotated[
        bool, typer.Option("--resize-real", help="Scale real images of another size.")
    ] = False,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="Test the difference of two methods; repeat it.",
            show_default="none",
        ),
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Do this part of the images only, from 1/N to N/N.")
    ] = "1/1",
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="generate, measure or report; repeat it.",
            show_default="all; with --shard, generate and measure",
        ),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Layouts shown in the report.")] = 12,
    export: Annotated[
        Path | None,
        typer.Option(help="Folder for the images as the scorer of coco-mig or gligen-coco reads."),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD=FILE", help="Add what that scorer wrote to the report; repeat it."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace reports, exports, and images of another run.")
    ] = False,
    json_: AsMarkdown = False,
) -> None:
    """Compare methods on the same captions, layouts, seeds and steps.

    Images, then measurements, then the report, each kept: a stopped run goes on where it was.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise BackendError(
            "a library for the evaluation is missing",
            value=", ".join(missing),
            remedy='Run pip install "hcma-fast[eval]".',
        )
    from hcma_fast.bench.quality.generate import RunSettings, Shard, check_plan, generate, open_run
    from hcma_fast.bench.quality.items import items_hash
    from hcma_fast.bench.quality.measure import measure
    from hcma_fast.bench.quality.methods.table import Method
    from hcma_fast.bench.quality.protocols.scorer_files import split_scores, with_scores
    from hcma_fast.bench.quality.scores import check_pairs, score_run

    part = Shard.parse(shard)
    stages = tuple(stage or (_STAGES if part.count == 1 else _STAGES[:2]))
    _check_stages(stages, part.count)
    methods = [Method.parse(text) for text in method or ("gligen", "hcma")]
    pairs = [_pair(text) for text in compare or ()]
    check_pairs(methods, pairs)
    if "report" in stages and not force:
        _check_absent(out)
    items, source, benchmark = choose_items(data, manifest, count, root=root, skip_bad=skip_bad)
    check_benchmark(benchmark, export, scores, stages, part.count)
    named = [split_scores(text, methods) for text in scores or ()]
    instruments = choose_instruments(
        items,
        metric,
        features,
        clip,
        detector,
        resize_real,
        needed=benchmark is None and stages != ("generate",),
    )
    instruments = leave_out_too_few(instruments, items)
    instruments.check(items)
    runner = _runner(model, aligner, backend, device, methods, attention_factor)
    pipe = runner.pipe
    check_plan(runner, methods, items, batch_size)
    run = RunSettings(
        preset=pipe.preset,
        backend=pipe.backend,
        device=pipe.device,
        weights_hash=pipe.weights_hash,
        engine_hash=pipe.engine_hash,
        settings=pipe.settings,
        num_inference_steps=steps,
        seed=seed,
        width=pipe.image_shape[1],
        height=pipe.image_shape[0],
        count=len(items),
        items_hash=items_hash(items),
        data=source,
        attention_factor=attention_factor,
    )
    found = [(label, benchmark.read_scores(path, run)) for label, path in named if benchmark]
    with output_folder(out):
        open_run(out, run, force=force)
        with _Bars() as bars:
            if "generate" in stages:
                generate(
                    runner,
                    methods,
                    items,
                    run,
                    out,
                    batch_size=batch_size,
                    shard=part,
                    progress=bars.of("images"),
                )
            if "measure" in stages:
                measure(
                    instruments,
                    methods,
                    items,
                    run,
                    out,
                    shard=part,
                    progress=bars.of("measuring"),
                    note=print_note,
                )
        if export is not None and benchmark is not None:
            benchmark.export(methods, run, out, export, force=force)
        if "report" not in stages:
            return
        from hcma_fast.bench.quality.report.page import page
        from hcma_fast.bench.quality.report.tables import as_csv, markdown

        report = score_run(
            instruments,
            methods,
            items,
            run,
            out,
            pairs=pairs,
            command=_command(),
            progress=lambda label: print_note(f"scoring {label}"),
        )
        report = with_scores(report, found)
        html = page(report, methods, items, out, pictures=pictures, resize_real=resize_real)
        contents = (report.model_dump_json(indent=2), as_csv(report), markdown(report), html)
        for name, text in zip(_REPORTS, contents, strict=True):
            write_file(out / name, text.encode())
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(markdown(report))


class _Bars:
    """A bar per method and stage, with the time left."""

    def __init__(self) -> None:
        self._progress = counting_bar()
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def of(self, stage: str) -> _Bar:
        return _Bar(self, stage)

    def advance(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done)


class _Bar:
    def __init__(self, bars: _Bars, stage: str) -> None:
        self._bars, self._stage = bars, stage

    def __call__(self, name: str, done: int, total: int) -> None:
        self._bars.advance(f"{self._stage} {name}", done, total)


def _check_stages(stages: Sequence[str], shards: int) -> None:
    for name in stages:
        if name not in _STAGES:
            raise UsageError("unknown stage", value=name, remedy=f"Stages: {', '.join(_STAGES)}.")
    if "report" in stages and shards > 1:
        raise UsageError(
            "a report needs the whole run, not a shard",
            value=f"{shards} shards",
            remedy="Run all shards first, then --stage report without --shard.",
        )


def _check_absent(out: Path) -> None:
    for name in _REPORTS:
        if (out / name).exists():
            raise OutputError(
                "the report exists already",
                value=str(out / name),
                remedy="Use --force to replace it (finished images stay), or another --out.",
            )


def _pair(text: str) -> tuple[str, str]:
    # settings of a method hold commas too: "hcma:eta0=1,lambda_global=2,gligen" splits at the last
    first, comma, second = text.rpartition(",")
    if not comma or not first or not second:
        raise UsageError(
            "a comparison reads A,B", value=text, remedy="For example --compare hcma,gligen."
        )
    return first, second


def _runner(
    model: str,
    aligner: Path | None,
    backend: str,
    device: str | None,
    methods: Sequence[Method],
    attention_factor: int | None,
) -> Runner:
    """The loaded model; an SD 1.x folder without gates or aligner serves what needs neither."""
    from hcma_fast.bench.quality.methods.plain_checkpoint import (
        check_methods,
        lacks,
        load_plain_components,
    )
    from hcma_fast.bench.quality.methods.table import Runner
    from hcma_fast.models.checkpoint.folder import load_components
    from hcma_fast.models.checkpoint.info import resolve_folder
    from hcma_fast.runtime.pipeline import HCMAPipeline

    folder = resolve_folder(model, offline=False)
    if without := lacks(folder, aligner):
        check_methods(methods, without, backend)
        parts = load_plain_components(model, aligner)
        pipe = HCMAPipeline.from_components(parts, device=device or "cpu")
        return Runner(pipe, lambda: parts, attention_factor=attention_factor)
    with BuildProgress("Building engines, once for this model.") as building:
        pipe = HCMAPipeline.from_pretrained(
            model, backend=backend, device=device, aligner=aligner, progress=building
        )
    return Runner(
        pipe, lambda: load_components(model, aligner=aligner), attention_factor=attention_factor
    )


def _command() -> str:
    import shlex

    return " ".join(["hcma-fast", *(shlex.quote(word) for word in sys.argv[1:])])
