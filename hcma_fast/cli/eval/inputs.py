"""What `hcma-fast eval` runs over and measures with, from its options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hcma_fast.cli.output import print_note
from hcma_fast.errors import UsageError

if TYPE_CHECKING:
    from hcma_fast.bench.quality.items import EvalItem
    from hcma_fast.bench.quality.measure import Instruments
    from hcma_fast.bench.quality.protocols.scorer_files import Benchmark
    from hcma_fast.train.data.coco_records import BadRecord

_EMOJI = {"emoji-scenes": "test", "emoji-scenes:test": "test", "emoji-scenes:val": "val"}


def choose_items(
    data: str,
    manifest: Path | None,
    count: int | None,
    *,
    root: Path | None = None,
    skip_bad: bool = False,
) -> tuple[list[EvalItem], str, Benchmark | None]:
    """The layouts, where they are from in words, and the benchmark that they belong to, if any.

    Args:
        root: images' names may be absolute or have "..", as long as they lie in this folder.
        skip_bad: leave out COCO's bad records, which are errors otherwise, and list them.

    Raises:
        UsageError, InputError: unknown data, unusable files, or fewer layouts than asked for.
    """
    from hcma_fast.bench.quality.items import emoji_items, read_items

    if manifest is not None:
        items = read_items(manifest, image_root=root)
        return _first(items, count), manifest.name, None
    if data in _EMOJI:
        split = _EMOJI[data]
        scenes = emoji_items("val" if split == "val" else "test", count or 500)
        return scenes, f"EmojiScenes {split}", None
    kind, _, place = data.partition("=")
    if kind in ("coco2014", "gligen-coco") and place:
        return _coco(kind, Path(place), count, root, skip_bad)
    if kind == "coco-mig" and place:
        from hcma_fast.bench.quality.protocols.coco_mig import CocoMig

        mig = CocoMig.read(Path(place))
        return _first(mig.items, count), mig.title, mig
    raise UsageError(
        "unknown data",
        value=data,
        remedy="Use emoji-scenes, coco2014=FOLDER, gligen-coco=FOLDER, coco-mig=FILE, or "
        "--manifest.",
    )


def _coco(
    kind: str, folder: Path, count: int | None, root: Path | None, skip_bad: bool
) -> tuple[list[EvalItem], str, Benchmark | None]:
    from hcma_fast.bench.quality.items import COCO_COUNT, coco_items
    from hcma_fast.bench.quality.protocols.gligen_coco import GligenCoco

    bad: list[BadRecord] = []
    skipped = bad if skip_bad else None
    benchmark = None
    if kind == "coco2014":
        items = coco_items(folder, count or COCO_COUNT, skipped=skipped, image_root=root)
        title = "COCO 2014 validation"
    else:
        benchmark = GligenCoco.read(folder, count, skipped=skipped, image_root=root)
        items, title = benchmark.items, benchmark.title
    for record in bad:
        print_note(f"skipped: {record.why} ({record.path})")
    if bad:
        print_note(f"{len(bad)} records skipped")
    return items, title, benchmark


def _first(items: list[EvalItem], count: int | None) -> list[EvalItem]:
    if count is not None and count > len(items):
        raise UsageError(f"the file has {len(items)} layouts", value=count, remedy="Lower --count.")
    return items[:count]


def check_benchmark(
    benchmark: Benchmark | None,
    export: Path | None,
    scores: Sequence[str] | None,
    stages: Sequence[str],
    shards: int,
) -> None:
    """Refuse options of benchmarks where there is none, or that the stages leave no room for.

    Raises:
        UsageError.
    """
    if benchmark is None and (export is not None or scores):
        raise UsageError(
            "--export and --scores belong to benchmarks with a scorer of their own",
            value=str(export) if export else ", ".join(scores or ()),
            remedy="Use them with --data coco-mig=FILE or gligen-coco=FOLDER.",
        )
    if export is not None and shards > 1:
        raise UsageError(
            "an export needs the whole run, not a shard",
            value=f"{shards} shards",
            remedy="Run all shards first, then --export without --shard.",
        )
    if scores and "report" not in stages:
        raise UsageError(
            "--scores go into the report, and no report is asked for",
            value=", ".join(scores),
            remedy="Add --stage report.",
        )


def choose_instruments(
    items: Sequence[EvalItem],
    metric: list[str] | None,
    features: str | None,
    clip: str | None,
    detector: str | None,
    resize_real: bool,
    *,
    needed: bool,
) -> Instruments:
    """The networks that were asked for; on EmojiScenes both judges without being asked.

    Args:
        needed: refuse to have none.

    Raises:
        UsageError: there is none. WeightsError: one does not load.
    """
    from hcma_fast.bench.quality.measure import Instruments
    from hcma_fast.bench.quality.metrics.detection import Detector
    from hcma_fast.bench.quality.metrics.inception import InceptionFeatures
    from hcma_fast.bench.quality.metrics.judge.model import Judge
    from hcma_fast.bench.quality.metrics.likeness.model import LikenessJudge
    from hcma_fast.bench.quality.metrics.networks import (
        ClipScorer,
        FeatureNetwork,
        JudgeFeatures,
        VisionFeatures,
    )

    scenes = all(item.scene is not None for item in items)
    judge = Judge.load() if scenes else None
    likeness = LikenessJudge.load() if scenes else None
    network: FeatureNetwork | None = None
    kind, _, weights = (features or "").partition("=")
    if kind == "inception" and weights:
        network = InceptionFeatures(Path(weights))
    elif features is not None:
        network = VisionFeatures(features)
    elif judge is not None:
        network = JudgeFeatures(judge)
    real = all(item.has_real for item in items)
    possible = [
        *(["judge"] if judge else []),
        *(["likeness"] if likeness else []),
        *(["fid", "kid", "precision-recall"] if network and real else []),
        *(["clip"] if clip else []),
        *(["detector"] if detector else []),
    ]
    chosen = tuple(metric or possible)
    if needed and not chosen:
        raise UsageError(
            "there is nothing to measure with",
            value="no network",
            remedy="Name --features, --clip or --detector.",
        )
    return Instruments(
        metrics=chosen,
        judge=judge,
        likeness=likeness,
        features=network,
        clip=ClipScorer(clip) if clip else None,
        detector=Detector(detector) if detector else None,
        resize_real=resize_real,
    )


def leave_out_too_few(instruments: Instruments, items: Sequence[EvalItem]) -> Instruments:
    """Leave out the metrics that these layouts are too few for, and say so.

    Raises:
        InputError: none would be left.
    """
    kept = instruments.without_too_few(items)
    for why in kept.too_few(items).values():
        print_note(f"left out: {why}")
    return kept
