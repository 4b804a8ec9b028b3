"""The quality report: counting, intervals, resuming and the contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from watched_pipeline import WatchedPipeline

from hcma_fast.bench.quality.evaluate import QualityReport, evaluate, measure
from hcma_fast.bench.quality.metrics.judge.model import Judge
from hcma_fast.bench.quality.metrics.likeness.model import LikenessJudge
from hcma_fast.errors import UsageError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.train.data.emoji_scenes import CATEGORY_NAMES, render_scene, sample_scene

FEW: dict[str, Any] = {"count": 4, "batch_size": 2, "num_inference_steps": 2}


@pytest.fixture
def pipe(random_components: Components) -> WatchedPipeline:
    made = WatchedPipeline.from_components(random_components)
    assert isinstance(made, WatchedPipeline)
    return made


def seeds(pipe: WatchedPipeline) -> list[list[int]]:
    return [[request.seed for request in batch] for batch in pipe.batches]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_end_to_end_and_resumes_without_generating_again(
    pipe: WatchedPipeline, judge: Judge, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    arguments = {**FEW, "work": tmp_path, "judge": judge}
    report = evaluate(pipe, **arguments, progress=lambda *done: seen.append(done))
    assert seen == [(2, 4), (4, 4)] and len(pipe.batches) == 2
    scene = sample_scene("test", 3)
    assert seeds(pipe)[1] == [2, 3]
    request = pipe.batches[1][1]
    assert request.prompt in scene.captions
    assert request.layout.boxes == tuple(item.box for item in scene.objects)
    for share in (report.large_boxes, report.all_boxes):
        assert share.accuracy is not None and share.interval is not None
        assert 0 <= share.interval[0] <= share.accuracy <= share.interval[1] <= 1
    assert report.all_boxes.total == sum(len(sample_scene("test", i).objects) for i in range(4))
    assert QualityReport.model_validate_json(report.model_dump_json()) == report
    # two steps of random weights draw nothing that is like anything
    likeness = report.likeness
    assert likeness.all_boxes.correct == 0 < likeness.ceiling_all_boxes.correct

    again = evaluate(pipe, **arguments)
    assert len(pipe.batches) == 2
    assert again.model_copy(update={"date": report.date}) == report
    # what is there serves a longer run as well
    evaluate(pipe, **{**arguments, "count": 6})
    assert seeds(pipe)[2:] == [[4, 5]]


def test_other_settings_are_other_images(
    pipe: WatchedPipeline, judge: Judge, tmp_path: Path
) -> None:
    for changes in ({}, {"eta0": 0.0}, {"guidance_scale": 2.0}, {"seed": 9}, {"split": "val"}):
        evaluate(pipe, **{**FEW, "count": 2, "work": tmp_path, "judge": judge, **changes})
    assert len(pipe.batches) == 5
    asked = [batch[0].settings for batch in pipe.batches]
    assert asked[1].eta0 == 0 and asked[0].eta0 == pipe.settings.eta0
    assert asked[2].guidance_scale == 2


def test_a_damaged_batch_is_generated_again(
    pipe: WatchedPipeline, judge: Judge, tmp_path: Path
) -> None:
    report = evaluate(pipe, **FEW, work=tmp_path, judge=judge)
    first = sorted(tmp_path.rglob("*.npz"))[0]
    first.write_bytes(first.read_bytes()[:-40])
    again = evaluate(pipe, **FEW, work=tmp_path, judge=judge)
    assert seeds(pipe) == [[0, 1], [2, 3], [0, 1]]
    assert again.all_boxes == report.all_boxes
    assert not list(tmp_path.rglob("*.part"))


def test_a_faultless_generator_reaches_the_ceiling(
    pipe: WatchedPipeline, judge: Judge, tmp_path: Path
) -> None:
    pipe.draw = lambda request: render_scene(
        sample_scene("test", request.seed), "test", request.seed
    )
    grid = tmp_path / "grid.png"
    report = evaluate(pipe, **{**FEW, "count": 12}, judge=judge, grid=grid)
    assert report.all_boxes.accuracy is not None and report.all_boxes.accuracy > 0.9
    counted = [
        item
        for i in range(12)
        for item in sample_scene("test", i).objects
        if min(item.box[2] - item.box[0], item.box[3] - item.box[1]) >= 0.25
    ]
    assert report.large_boxes.total == len(counted) < report.all_boxes.total
    assert sum(s.total for s in report.per_category.values()) == len(counted)
    assert set(report.per_category) == set(CATEGORY_NAMES)
    missed = report.large_boxes.total - report.large_boxes.correct
    assert sum(times for *_, times in report.mistaken_for) == missed
    # the likeness judge sees the same boxes, on the same pictures
    likeness, alone = report.likeness, LikenessJudge.load()
    direct = 0
    for i in range(12):
        objects = sample_scene("test", i).objects
        picture = np.asarray(render_scene(sample_scene("test", i), "test", i))
        boxes, phrases = [o.box for o in objects], [o.phrase for o in objects]
        direct += sum(alone.recognised(picture, boxes, phrases, edition=1))
    assert likeness.all_boxes.correct == direct
    # the ceiling is drawn at the model's own size
    assert likeness.ceiling_large_boxes.total == likeness.large_boxes.total
    assert likeness.all_boxes.total == report.all_boxes.total
    assert likeness.large_boxes.accuracy is not None and likeness.large_boxes.accuracy > 0.8
    for name, share in likeness.per_category.items():
        assert share.total == report.per_category[name].total
    assert sum(s.correct for s in likeness.per_category.values()) == likeness.large_boxes.correct
    with Image.open(grid) as sheet:
        assert sheet.size == (8 * 192, 2 * 192)
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**20) or []}
    assert (0, 160, 0) in colours


def test_share_counts_and_its_interval_shrinks_with_more_images() -> None:
    hits = [[True, False], [True], [False]]
    share = measure(hits, [[True, True], [True], [False]])
    assert (share.correct, share.total) == (2, 3)
    assert share.accuracy == pytest.approx(2 / 3)

    def width(copies: int) -> float:
        interval = measure(hits * copies, [[True] * len(h) for h in hits] * copies).interval
        assert interval is not None
        return interval[1] - interval[0]

    assert width(100) < width(10) < width(1)
    empty = measure(hits, [[False] * len(h) for h in hits])
    assert (empty.total, empty.accuracy, empty.interval) == (0, None, None)


def test_interval_is_close_to_the_binomial_one() -> None:
    hits = [[bool(value)] for value in np.arange(400) % 4]
    interval = measure(hits, [[True]] * 400).interval
    assert interval is not None
    margin = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval == pytest.approx((0.75 - margin, 0.75 + margin), abs=0.01)


@pytest.mark.parametrize(
    "changes", [{"count": 0}, {"batch_size": 0}, {"eta0": -1.0}, {"guidance_scale": 0.5}]
)
def test_bad_settings_are_refused(
    pipe: WatchedPipeline, judge: Judge, changes: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        evaluate(pipe, **{**FEW, "judge": judge, **changes})
    assert pipe.batches == []
