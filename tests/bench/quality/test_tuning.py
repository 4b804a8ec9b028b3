"""The search for alignment settings, over a scorer of known optimum."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hcma_fast import HCMAPipeline
from hcma_fast.bench.quality.metrics.judge.model import CONFIDENCE_FLOOR, Judge
from hcma_fast.bench.quality.tuning import search as tune_alignment
from hcma_fast.bench.quality.tuning.files import plot_png, trials_csv, tuning_table
from hcma_fast.bench.quality.tuning.judge_score import JudgeScore
from hcma_fast.bench.quality.tuning.records import Plan, Readings, TuningReport
from hcma_fast.bench.quality.tuning.search import search
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import BackendError, DivergenceError, InputError, UsageError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.output import HCMAOutput
from hcma_fast.train.data.emoji_scenes import render_scene, sample_scene

PLAN = Plan(
    base=AlignmentSettings(eta0=3.0, guidance_scale=2.0),
    eta0_range=(1.0, 100.0),
    count=40,
    confirm=40,
    chunk=10,
    score="recognised",
)
CONFIDENCE = PLAN.model_copy(update={"score": "confidence"})


class Peak:
    """Scores fall with the distance of eta0 from 20 in octaves; every fifth has no large box.

    Confidence is negative throughout and has a value for every image.
    """

    def __init__(self, *, height: float = 0.4, limit: float = math.inf, stop: float = math.inf):
        self.height, self.limit, self.stop = height, limit, stop
        self.calls: list[tuple[AlignmentSettings, int, int]] = []

    def __call__(self, settings: AlignmentSettings, start: int, stop: int) -> Readings:
        if settings.eta0 > self.limit:
            raise DivergenceError("the latent diverged", remedy="Lower eta0.")
        if len(self.calls) >= self.stop:
            raise KeyboardInterrupt
        self.calls.append((settings, start, stop))
        places = np.arange(start, stop)
        # the same image is as hard under all settings
        scores = 0.3 + 0.2 * np.sin(places)
        if settings.eta0:
            scores = scores + self.height * max(0, 1 - abs(math.log2(settings.eta0 / 20)) / 3)
        return {
            "recognised": np.where(places % 5 == 0, np.nan, scores),
            "confidence": scores - 4,
        }

    def forget(self) -> None:
        pass


def without_date(report: TuningReport) -> dict[str, Any]:
    return report.model_dump(exclude={"date"})


@pytest.mark.slow
def test_finds_the_optimum_and_confirms_it_on_fresh_layouts(tmp_path: Path) -> None:
    peak = Peak()
    report = search(peak, PLAN, tmp_path, trials=20)
    assert report.settings is not None and 10 < report.settings.eta0 < 40
    assert report.verdict == "better"
    fresh = report.confirmation
    assert fresh is not None and fresh.images == 32
    assert fresh.difference == pytest.approx(fresh.score - fresh.off)
    assert 0 < fresh.interval[0] <= fresh.difference <= fresh.interval[1]
    seen = {start for settings, start, _ in peak.calls if settings == report.settings}
    assert seen == set(range(0, 80, 10))
    # kept from the checkpoint
    assert report.settings.guidance_scale == 2 and report.settings.normalized is False


def test_off_and_the_own_settings_are_always_tried(tmp_path: Path) -> None:
    peak = Peak()
    report = search(peak, PLAN, tmp_path, trials=1)
    off, own = report.trials
    assert (off.number, off.state, off.eta0) == (0, "off", 0)
    assert (own.eta0, own.window, own.lambda_global, own.lambda_local) == (3, (0, 1), 1, 1)
    assert {settings.eta0 for settings, *_ in peak.calls} == {0, 3}


@pytest.mark.slow
def test_hopeless_trials_stop_early_and_are_compared_on_what_they_saw(tmp_path: Path) -> None:
    report = search(Peak(), PLAN, tmp_path, trials=15)
    pruned = [trial for trial in report.trials if trial.state == "pruned"]
    assert pruned
    for trial in pruned:
        assert trial.comparison is not None and trial.comparison.images < 32
        # eight of ten images have a score
        off = Peak()(AlignmentSettings(eta0=0), 0, trial.comparison.images * 10 // 8)
        assert trial.comparison.off == pytest.approx(np.nanmean(off["recognised"]))


@pytest.mark.slow
@pytest.mark.parametrize("calls", [2, 15])
def test_a_stopped_search_goes_on_as_if_it_had_not_been(tmp_path: Path, calls: int) -> None:
    whole = search(Peak(), PLAN, tmp_path / "whole", trials=12)
    with pytest.raises(KeyboardInterrupt):
        search(Peak(stop=calls), PLAN, tmp_path / "halves", trials=12)
    again = Peak()
    assert without_date(search(again, PLAN, tmp_path / "halves", trials=12)) == without_date(whole)
    # finished trials are not tried again, and a finished search scores nothing
    finished = Peak()
    search(finished, PLAN, tmp_path / "halves", trials=12)
    assert finished.calls == []


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_tuning import PLAN, Peak
from hcma_fast.bench.quality.tuning.search import search
class Killed(Peak):
    def __call__(self, *args):
        if len(self.calls) == 18:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*args)
search(Killed(), PLAN, Path(sys.argv[1]), trials=8)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_finished_trial(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "killed"), str(Path(__file__).parent)]
    done = subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    again = Peak()
    report = search(again, PLAN, tmp_path / "killed", trials=8)
    whole = Peak()
    assert without_date(report) == without_date(search(whole, PLAN, tmp_path / "w", trials=8))
    assert len(again.calls) <= len(whole.calls) - 16


@pytest.mark.slow
def test_more_trials_extend_a_search(tmp_path: Path) -> None:
    first = search(Peak(), PLAN, tmp_path, trials=5)
    more = search(Peak(), PLAN, tmp_path, trials=9)
    assert [t.eta0 for t in more.trials[:6]] == [t.eta0 for t in first.trials]
    assert len(more.trials) == 10
    assert len({(t.eta0, t.window) for t in more.trials}) == 10


def test_timeout_starts_no_trial(tmp_path: Path) -> None:
    report = search(Peak(), PLAN, tmp_path, trials=5, timeout=0)
    assert [trial.state for trial in report.trials] == ["off"]
    assert (report.best, report.settings, report.verdict) == (None, None, "not better")


@pytest.mark.slow
@pytest.mark.parametrize(("height", "verdict"), [(0.0, "not better"), (-0.3, "not better")])
def test_no_improvement_is_said_and_ties_go_to_the_smallest_step(
    tmp_path: Path, height: float, verdict: str
) -> None:
    report = search(Peak(height=height), PLAN, tmp_path, trials=6)
    assert report.verdict == verdict
    assert report.confirmation is not None and report.confirmation.difference <= 0
    complete = [trial for trial in report.trials if trial.state == "complete"]
    best = next(trial for trial in complete if trial.number == report.best)
    tied = [trial for trial in complete if trial.number in report.tied]
    assert all(trial.eta0 >= best.eta0 for trial in tied)
    if not height:
        assert len(tied) == len(complete) - 1 > 0


class Luck(Peak):
    """A gain of one image in four, a loss of the same size in another: no evidence of anything."""

    def __call__(self, settings: AlignmentSettings, start: int, stop: int) -> Readings:
        places = np.arange(start, stop)
        scores = 0.5 + bool(settings.eta0) * (0.1 * (places % 4 == 1) - 0.09 * (places % 4 == 2))
        return {"recognised": scores, "confidence": scores - 4}


def test_a_gain_within_the_noise_is_undecided(tmp_path: Path) -> None:
    report = search(Luck(), PLAN, tmp_path, trials=2)
    assert report.verdict == "undecided"
    assert report.confirmation is not None
    assert report.confirmation.interval[0] <= 0 < report.confirmation.difference


@pytest.mark.slow
def test_diverging_settings_are_recorded_and_never_win(tmp_path: Path) -> None:
    report = search(Peak(limit=8), PLAN, tmp_path, trials=10)
    diverged = [trial for trial in report.trials if trial.state == "diverged"]
    assert diverged and all(t.eta0 > 8 and t.comparison is None for t in diverged)
    assert report.settings is not None and report.settings.eta0 <= 8
    none = search(Peak(limit=0.5), PLAN, tmp_path / "none", trials=3)
    assert (none.best, none.verdict) == (None, "not better")
    assert plot_png(none)


@pytest.mark.slow
def test_files_hold_every_trial(tmp_path: Path) -> None:
    report = search(Peak(limit=60), PLAN, tmp_path, trials=12)
    rows = list(csv.DictReader(io.StringIO(trials_csv(report))))
    assert [int(row["number"]) for row in rows] == list(range(13))
    for row, trial in zip(rows, report.trials, strict=True):
        assert float(row["eta0"]) == trial.eta0 and row["state"] == trial.state
        assert (row["score"] == "") == (trial.comparison is None)
    with Image.open(io.BytesIO(plot_png(report))) as plot:
        assert plot.format == "PNG" and plot.width > 1000
        assert len(plot.convert("RGB").getcolors(2**20) or []) > 10
    assert TuningReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("low_high", [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf)])
def test_bad_ranges_are_refused(tmp_path: Path, low_high: tuple[float, float]) -> None:
    peak = Peak()
    with pytest.raises(UsageError, match="range"):
        search(peak, PLAN.model_copy(update={"eta0_range": low_high}), tmp_path)
    assert peak.calls == []


def test_layouts_without_a_large_box_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="box that counts"):
        search(Peak(), PLAN.model_copy(update={"count": 1, "chunk": 1}), tmp_path)
    # a confidence they have; there is only nothing to say of large boxes
    few = CONFIDENCE.model_copy(update={"count": 5, "confirm": 1, "chunk": 5})
    report = search(Peak(), few, tmp_path / "confidence", trials=1)
    assert report.confirmation is not None and report.recognised is None


def test_a_search_by_confidence_reports_the_boxes_recognised_too(tmp_path: Path) -> None:
    report = search(Peak(), CONFIDENCE, tmp_path, trials=2)
    assert report.verdict == "better"
    sure, seen = report.confirmation, report.recognised
    assert sure is not None and seen is not None
    assert -4 < sure.off < sure.score < 0 and sure.images == 40
    assert seen.images == 32 and 0 < seen.off < seen.score
    lines = tuning_table(report).splitlines()
    assert f"40 images) {sure.score:.3f}, off {sure.off:.3f}" in lines[-3]
    assert f"(32 images) {seen.score:.1%}, off {seen.off:.1%}" in lines[-2]
    assert "log-probability" in lines[0] and "%" not in "".join(lines[4:-3])
    rows = list(csv.DictReader(io.StringIO(trials_csv(report))))
    assert {row["scored_by"] for row in rows} == {"confidence"}
    # the same search by the other score says it once
    other = search(Peak(), PLAN, tmp_path / "other", trials=2)
    assert other.recognised is None
    assert "log-probability" not in tuning_table(other)
    assert plot_png(report) != plot_png(other)


def test_a_diverging_setting_is_the_worst_by_any_score(tmp_path: Path) -> None:
    for plan in (PLAN, CONFIDENCE):
        folder = tmp_path / plan.score
        report = search(Peak(limit=8), plan, folder, trials=5)
        study = tune_alignment._open(folder / "study.sqlite")
        values = {trial.state: [] for trial in report.trials}
        for trial, told in zip(report.trials[1:], tune_alignment._finished(study), strict=True):
            values[trial.state].append(told.value)
        assert max(values["diverged"]) < min(values["complete"])


def test_a_damaged_study_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(InputError, match=r"study\.sqlite"):
        search(Peak(), PLAN, tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_alignment, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"optuna.*hcma-fast\[train\]"):
        search(Peak(), PLAN, tmp_path)


class Renderer(HCMAPipeline):
    """Draws the val scenes when aligned with the expected settings, else nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> HCMAOutput:
        output = super().__call__(*args, **kwargs)
        good = (kwargs["eta0"], kwargs["align_window"]) == (2.0, (0.1, 0.9))
        good = good and (kwargs["lambda_global"], kwargs["lambda_local"]) == (0.5, 1.5)
        scenes = [render_scene(sample_scene("val", i - 7), "val", i - 7) for i in output.seeds]
        blank = [Image.new("RGB", scene.size) for scene in scenes]
        return HCMAOutput(scenes if good else blank, output.losses, output.seeds, output.latents)


def test_judge_score_passes_the_settings_on_and_keeps_images_until_forgotten(
    random_components: Components, tmp_path: Path
) -> None:
    pipe = Renderer.from_components(random_components)
    arguments: dict[str, Any] = {"seed": 7, "batch_size": 3, "num_inference_steps": 2}
    with pytest.raises(UsageError, match="EmojiScenes"):
        JudgeScore(pipe, Judge.load(), **arguments, work=tmp_path)
    pipe.info = pipe.info.model_copy(update={"preset": "tiny"})
    score = JudgeScore(pipe, Judge.load(), **arguments, work=tmp_path / "images")
    good = AlignmentSettings(eta0=2, window=(0.1, 0.9), lambda_global=0.5, lambda_local=1.5)
    readings = score(good, 10, 18)
    scores, sure = readings["recognised"], readings["confidence"]
    assert scores.shape == (8,) and np.nanmean(scores) > 0.9
    assert sure.shape == (8,) and sure.mean() > -0.3 and sure.max() < 0
    blank = score(good.model_copy(update={"eta0": 0.0}), 10, 18)
    assert np.nanmean(blank["recognised"]) < 0.2
    # a lost object counts as log 0.01, however sure the judge is that it is none
    assert blank["confidence"] == pytest.approx(CONFIDENCE_FLOOR, abs=1.5)
    assert blank["confidence"].min() >= CONFIDENCE_FLOOR
    large = [
        any(min(o.box[2] - o.box[0], o.box[3] - o.box[1]) >= 0.25 for o in scene.objects)
        for scene in (sample_scene("val", index) for index in range(10, 18))
    ]
    assert (~np.isnan(scores)).tolist() == large
    assert len(list((tmp_path / "images").rglob("*.npz"))) == 6
    score.forget()
    assert not (tmp_path / "images").exists()
