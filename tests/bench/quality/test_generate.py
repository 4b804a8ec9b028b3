"""Resuming, shards and what an evaluation refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hcma_fast import HCMAPipeline
from hcma_fast.bench.quality.generate import (
    BLOCK,
    RunSettings,
    Shard,
    check_plan,
    finished,
    generate,
    image_files,
    load_records,
    open_run,
)
from hcma_fast.bench.quality.items import (
    EvalItem,
    emoji_items,
    items_hash,
)
from hcma_fast.bench.quality.measure import REAL, Instruments, Measured, block_file, measure
from hcma_fast.bench.quality.methods.table import Generated, Method, Runner
from hcma_fast.bench.quality.metrics.fidelity import Features
from hcma_fast.bench.quality.metrics.judge.model import CONFIDENCE_FLOOR, Judge
from hcma_fast.bench.quality.metrics.likeness.model import LikenessJudge
from hcma_fast.bench.quality.metrics.networks import JudgeFeatures, VisionFeatures, cut
from hcma_fast.bench.quality.scores import score_run
from hcma_fast.errors import InputError, UsageError
from hcma_fast.layout import Box, Layout
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.train.data.emoji_scenes import render_scene, sample_scene

METHODS = [Method.parse("gligen"), Method.parse("hcma")]
COUNT = BLOCK + 5


class Drawing(Runner):
    """Draws noise by seed instead of generating, remembers the seeds, and dies when told to."""

    made: list[tuple[str, int]]
    dies_after: int | None = None

    def generate(
        self, method: Method, items: Sequence[EvalItem], steps: int, seeds: Sequence[int]
    ) -> Generated:
        if self.dies_after is not None and len(self.made) >= self.dies_after:
            raise KeyboardInterrupt
        self.made += [(method.label, seed) for seed in seeds]
        images = [
            np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8) for seed in seeds
        ]
        return Generated(images, [[0.5, None]] * len(images), 0.1, 0, 0, 2)


class Rendering(Drawing):
    """Draws the scenes themselves: a faultless generator."""

    def generate(
        self, method: Method, items: Sequence[EvalItem], steps: int, seeds: Sequence[int]
    ) -> Generated:
        found = super().generate(method, items, steps, seeds)
        renders = [
            np.asarray(render_scene(sample_scene(*item.scene), *item.scene))
            for item in items
            if item.scene
        ]
        return Generated(renders, found.losses, 0.1, 0, 0, 2)


@pytest.fixture
def items() -> list[EvalItem]:
    return emoji_items("test", COUNT)


def make(kind: type[Drawing], components: Components) -> Drawing:
    runner = kind(HCMAPipeline.from_components(components), lambda: components)
    runner.made = []
    return runner


def settings(items: Sequence[EvalItem], runner: Runner, **changes: Any) -> RunSettings:
    values: dict[str, Any] = {
        "preset": "random",
        "backend": "eager",
        "device": "cpu",
        "weights_hash": "0",
        "engine_hash": None,
        "settings": runner.pipe.settings,
        "num_inference_steps": 2,
        "seed": 10,
        "width": 64,
        "height": 64,
        "count": len(items),
        "items_hash": items_hash(items),
        "data": "EmojiScenes test",
        "attention_factor": None,
    }
    return RunSettings(**{**values, **changes})


def test_stopped_at_any_image_it_neither_loses_nor_repeats_one(
    random_components: Components, items: list[EvalItem], tmp_path: Path
) -> None:
    runner = make(Drawing, random_components)
    run = settings(items, runner)
    open_run(tmp_path, run, force=False)
    for stop in (3, 20, 24, 39):
        runner.dies_after = stop
        with pytest.raises(KeyboardInterrupt):
            generate(runner, METHODS, items, run, tmp_path, batch_size=3)
    runner.dies_after = None
    generate(runner, METHODS, items, run, tmp_path, batch_size=3)
    assert sorted(runner.made) == sorted(
        (method.label, 10 + i) for method in METHODS for i in range(COUNT)
    )
    assert generate(runner, METHODS, items, run, tmp_path, batch_size=3) == 0
    records = load_records(tmp_path, METHODS[0], items, run)
    assert [record.seed for record in records] == [10 + i for i in range(COUNT)]
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_or_half_written_image_is_made_again(
    random_components: Components, items: list[EvalItem], tmp_path: Path
) -> None:
    runner = make(Drawing, random_components)
    run = settings(items, runner)
    open_run(tmp_path, run, force=False)
    generate(runner, METHODS[:1], items, run, tmp_path, batch_size=4)
    runner.made.clear()
    picture, _ = image_files(tmp_path, METHODS[0], items[3])
    picture.write_bytes(picture.read_bytes()[:-10])
    image_files(tmp_path, METHODS[0], items[7])[1].unlink()
    with pytest.raises(InputError, match="2 of 21 images of gligen are missing"):
        load_records(tmp_path, METHODS[0], items, run)
    generate(runner, METHODS[:1], items, run, tmp_path, batch_size=4)
    assert [seed for _, seed in runner.made] == [13, 17]


def test_shards_share_the_images_and_the_lock_keeps_others_out(
    random_components: Components, items: list[EvalItem], tmp_path: Path
) -> None:
    runner = make(Drawing, random_components)
    run = settings(items, runner)
    open_run(tmp_path, run, force=False)
    for index in (2, 1):
        generate(runner, METHODS, items, run, tmp_path, batch_size=2, shard=Shard(index, 2))
    assert len(runner.made) == len(set(runner.made)) == 2 * COUNT
    assert all(finished(tmp_path, METHODS[1], item, run.digest) for item in items)
    with (
        FileLock(tmp_path / ".shard-1-of-2.lock"),
        pytest.raises(InputError, match="another process"),
    ):
        generate(runner, METHODS, items, run, tmp_path, batch_size=2, shard=Shard(1, 2))


@given(count=st.integers(1, 200), shards=st.integers(1, 9))
def test_every_item_is_in_exactly_one_shard(count: int, shards: int) -> None:
    items = [EvalItem(id=str(i), prompt="", layout=Layout.empty()) for i in range(count)]
    found = [
        (start + i, item.id)
        for index in range(1, shards + 1)
        for start, block in Shard(index, shards).blocks(items)
        for i, item in enumerate(block)
    ]
    assert sorted(found) == [(i, str(i)) for i in range(count)]


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1/0"])
def test_bad_shards_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Shard.parse(text)
    assert Shard.parse("2/4") == Shard(2, 4)


def test_another_run_does_not_overwrite_without_force(
    random_components: Components, items: list[EvalItem], tmp_path: Path
) -> None:
    runner = make(Drawing, random_components)
    run = settings(items, runner)
    open_run(tmp_path, run, force=False)
    generate(runner, METHODS[:1], items, run, tmp_path, batch_size=8)
    other = settings(items, runner, seed=11)
    with pytest.raises(InputError, match="another seed"):
        open_run(tmp_path, other, force=False)
    before = image_files(tmp_path, METHODS[0], items[0])[0].read_bytes()
    open_run(tmp_path, other, force=True)
    for content in ("{}", "[]", "", '{"name": "another program"}'):
        (tmp_path / "run.json").write_text(content)
        for force in (False, True):
            with pytest.raises(InputError, match="not one of hcma-fast eval"):
                open_run(tmp_path, other, force=force)
        assert (tmp_path / "run.json").read_text() == content
    assert generate(runner, METHODS[:1], items, other, tmp_path, batch_size=8) == COUNT
    assert image_files(tmp_path, METHODS[0], items[0])[0].read_bytes() != before


def judge_instruments(*metrics: str) -> Instruments:
    judge = Judge.load()
    return Instruments(
        metrics, judge=judge, likeness=LikenessJudge.load(), features=JudgeFeatures(judge)
    )


def test_a_faultless_generator_reaches_the_real_images(
    random_components: Components, items: list[EvalItem], tmp_path: Path
) -> None:
    perfect, noise = make(Rendering, random_components), make(Drawing, random_components)
    run = settings(items, perfect)
    instruments = judge_instruments("judge", "likeness", "kid", "precision-recall")
    instruments.check(items)
    open_run(tmp_path, run, force=False)
    generate(perfect, METHODS[:1], items, run, tmp_path, batch_size=8)
    generate(noise, METHODS[1:], items, run, tmp_path, batch_size=8)
    for index in (1, 2):
        measure(instruments, METHODS, items, run, tmp_path, shard=Shard(index, 2))
    report = score_run(instruments, METHODS, items, run, tmp_path, pairs=[("gligen", "hcma")])
    good, bad = report.methods
    assert report.real is not None
    outside = "images with nothing outside the boxes"
    assert good.scores[outside] == report.real.scores[outside]
    for name in (
        "region judge",
        "region judge, large boxes",
        "images with every box right",
        "objects counted right",
        "recognised by likeness",
        "recognised by likeness, large boxes",
    ):
        assert good.scores[name] == report.real.scores[name]
        assert good.scores[name].value > 0.8 > bad.scores[name].value + 0.4
    sure = "region judge, log-probability"
    assert good.scores[sure] == report.real.scores[sure]
    assert 0 > good.scores[sure].value > -0.5 > -3 > bad.scores[sure].value >= CONFIDENCE_FLOOR
    title = "(EmojiScenes, judge features)"
    assert good.scores[f"KID {title}"].value < bad.scores[f"KID {title}"].value / 10
    assert good.scores[f"precision {title}"].value == 1
    assert bad.scores[f"recall {title}"].value == 0
    # no plain FID on the judge's features, under whatever metric
    assert not [name for name in good.scores if "FID" in name]
    first = report.differences[0]
    assert first.metric == "region judge, large boxes: gligen - hcma"
    assert first.interval[0] > 0 and first.p_value < 0.01
    assert bad.losses == [0.5, None] and bad.cost is not None and bad.cost.aligner_passes == 2
    assert bad.cost.own_process is False


class MeanColours:
    """A feature network of four numbers a picture, whose distance goes by the name of FID."""

    title, width, distance = "mean colours", 4, "FID"

    def images(self, images: Sequence[Image.Image]) -> Features:
        pixels = [np.asarray(image, np.float32) / 255 for image in images]
        return np.stack([[*p.mean((0, 1)), p.std()] for p in pixels]).astype(np.float32)

    def crops(self, image: Image.Image, boxes: Sequence[Box]) -> Features:
        return self.images([cut(image, box) for box in boxes])


def test_the_network_names_its_distance(
    random_components: Components, items: list[EvalItem], tmp_path: Path
) -> None:
    runner = make(Rendering, random_components)
    run = settings(items, runner)
    open_run(tmp_path, run, force=False)
    generate(runner, METHODS[:1], items, run, tmp_path, batch_size=8)
    instruments = Instruments(("fid",), features=MeanColours())
    measure(instruments, METHODS[:1], items, run, tmp_path)
    scores = score_run(instruments, METHODS[:1], items, run, tmp_path).methods[0].scores
    assert list(scores) == ["FID (mean colours)", "FID (mean colours) of boxes"]
    assert scores["FID (mean colours)"].value == pytest.approx(0, abs=1e-6)
    assert JudgeFeatures.distance == VisionFeatures.distance == "Frechet distance"


def test_measuring_resumes_and_checks_images(
    random_components: Components, items: list[EvalItem], tmp_path: Path
) -> None:
    runner = make(Drawing, random_components)
    run = settings(items, runner)
    instruments = judge_instruments("judge")
    open_run(tmp_path, run, force=False)
    with pytest.raises(InputError, match="missing"):
        measure(instruments, METHODS[:1], items, run, tmp_path)
    generate(runner, METHODS[:1], items, run, tmp_path, batch_size=8)
    measure(instruments, METHODS[:1], items, run, tmp_path)
    path = block_file(tmp_path, "gligen", instruments.digest(run), BLOCK)
    whole = Measured.from_file(path)
    assert whole is not None and whole.whole.shape == (5, 256)
    assert len(whole.judged) == sum(len(item.layout) for item in items[BLOCK:])
    path.write_bytes(path.read_bytes()[:-50])
    other = block_file(tmp_path, REAL, instruments.digest(run), 0)
    untouched = other.stat().st_mtime_ns
    measure(instruments, METHODS[:1], items, run, tmp_path)
    again = Measured.from_file(path)
    assert again is not None and (again.whole == whole.whole).all()
    assert other.stat().st_mtime_ns == untouched
    wrong = settings(items, runner, width=32)
    with pytest.raises(InputError, match="another run"):
        measure(instruments, METHODS[:1], items, wrong, tmp_path)


def test_what_cannot_be_scored_is_refused_before_generating(items: list[EvalItem]) -> None:
    with pytest.raises(InputError, match="covariance"):
        judge_instruments("fid").check(items)
    with pytest.raises(UsageError, match="unknown metric"):
        judge_instruments("beauty").check(items)
    with pytest.raises(UsageError, match="no network"):
        judge_instruments("clip").check(items)
    bare = [item.model_copy(update={"scene": None}) for item in items]
    with pytest.raises(InputError, match="there are none"):
        judge_instruments("kid").check(bare)
    yeti = items[0].model_copy(update={"layout": Layout(["yeti"], [(0.0, 0.0, 1.0, 1.0)])})
    for names in (["judge"], ["likeness"], ["judge", "likeness"]):
        with pytest.raises(InputError, match="the judge has no category") as error:
            judge_instruments(*names).check([yeti])
        assert f"leave {' and '.join(names)} out" in str(error.value)
    with pytest.raises(UsageError, match="likeness has no network"):
        Instruments(("likeness",)).check(items)


def test_plan_is_checked(random_components: Components, items: list[EvalItem]) -> None:
    runner = make(Drawing, random_components)
    check_plan(runner, METHODS, items[:3], 4)
    with pytest.raises(UsageError, match="twice"):
        check_plan(runner, [METHODS[0], METHODS[0]], items[:3], 4)
    long = items[0].model_copy(update={"prompt": "word " * 80})
    with pytest.raises(InputError, match="tokens"):
        check_plan(runner, METHODS, [long], 4)
    with pytest.raises(UsageError, match="batches"):
        check_plan(runner, METHODS, items[:3], 4096)


def test_metrics_that_need_more_layouts_are_left_out(items: list[EvalItem]) -> None:
    every = judge_instruments("judge", "fid", "kid", "precision-recall")
    for count, lost in ((1, ("fid", "kid", "precision-recall")), (3, ("fid", "precision-recall"))):
        some = items[:count]
        kept = every.without_too_few(some)
        assert set(kept.metrics) == {"judge", "fid", "kid", "precision-recall"} - set(lost)
        kept.check(some)
        told = kept.too_few(some)
        assert set(lost) <= set(told) and "it needs 257 images" in told["fid"]
    bare = [item.model_copy(update={"layout": Layout.empty()}) for item in items]
    assert "0" in every.too_few(bare)["kid of boxes"]
    with pytest.raises(InputError, match="no metric that was asked for"):
        judge_instruments("fid").without_too_few(items)
