"""``hcma-fast eval``: end to end on a small random model, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hcma_fast.bench.shared.machine import Machine
from hcma_fast.cli.app import app
from hcma_fast.errors import InputError, OutputError, UsageError


def run(checkpoint: Path, out: Path, *more: str) -> Result:
    few = ["--backend", "eager", "--count", "2", "--steps", "2", "--out", str(out)]
    return CliRunner().invoke(app, ["eval", "--model", str(checkpoint), *few, *more])


METRICS = ("--metric", "judge", "--metric", "kid")


def test_a_whole_run_leaves_a_report_and_a_second_one_needs_force(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    methods = ["--method", "gligen", "--method", "hcma", "--method", "hcma:eta0=2"]
    pair = ["--compare", "hcma:eta0=2,gligen"]
    result = run(random_checkpoint, out, *methods, *METRICS, *pair, "--batch-size", "2")
    assert result.exit_code == 0, result.output
    page = (out / "report.md").read_text()
    assert result.stdout.strip() == page.strip()
    assert "| region judge, large boxes |" in page and "EmojiScenes, judge features" in page
    assert "hcma:eta0=2 - gligen" in page and "FID (" not in page

    html = (out / "report.html").read_text()
    # self-contained: nothing but data in it
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert html.count("<svg") == 2 * 4 and html.count("<figure>") == 3
    assert "<rect" in html and "Loss against step" in html and "Score against eta" in html

    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert {row["method"] for row in rows} == {"gligen", "hcma", "hcma:eta0=2", "real images"}
    costs = {row["method"]: row["value"] for row in rows if row["score"] == "aligner_passes"}
    assert costs == {"gligen": "0.0", "hcma": "2.0", "hcma:eta0=2": "2.0"}
    scores = json.loads((out / "scores.json").read_text())
    assert scores["run"]["count"] == 2 and scores["machine"]["torch_threads"] >= 1
    machine = Machine.model_validate(scores["machine"]).line()
    assert f"{machine}." in page and machine in unescape(html)

    again = run(random_checkpoint, out, *methods, *METRICS)
    assert isinstance(again.exception, OutputError) and "--force" in str(again.exception)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    forced = run(random_checkpoint, out, *methods, *METRICS, "--force", "--json")
    assert forced.exit_code == 0, forced.output
    assert json.loads(forced.stdout)["methods"][0]["method"] == "gligen"
    # finished images are not made again
    assert kept and {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == kept


@pytest.mark.slow
def test_shards_then_a_report(random_checkpoint: Path, tmp_path: Path) -> None:
    more = ("--method", "gligen", *METRICS)
    early = run(random_checkpoint, tmp_path, *more, "--stage", "report")
    assert isinstance(early.exception, InputError) and "missing" in str(early.exception)
    for shard in ("1/2", "2/2"):
        part = run(random_checkpoint, tmp_path, *more, "--shard", shard)
        assert part.exit_code == 0 and part.stdout == "", part.output
        assert not (tmp_path / "report.md").exists()
    result = run(random_checkpoint, tmp_path, *more, "--stage", "report")
    assert result.exit_code == 0 and (tmp_path / "report.html").exists()


def test_a_benchmark_is_drawn_exported_for_its_scorer_and_its_scores_come_back(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    boxes = ([0.1, 0.2, 0.5, 0.75], [0.5, 0.25, 1, 0.9])
    names = ("a blue fork", "a red cup")
    segment = [{"bbox": box, "label": name} for box, name in zip(boxes, names, strict=True)]
    sample = {"caption": "a photo of a blue fork and a red cup ", "segment": segment}
    layouts, metric = tmp_path / "mig_bench.json", tmp_path / "metric_eval.json"
    layouts.write_text(json.dumps({"7": sample, "11": sample}))
    metric.write_text('{"inst_sucess_ratio": 0.25, "miou": 0.5}')
    out, export = tmp_path / "run", tmp_path / "export"
    mig = ["--data", f"coco-mig={layouts}", "--method", "gligen", "--export", str(export)]
    result = run(random_checkpoint, out, *mig, "--scores", f"gligen={metric}")
    assert result.exit_code == 0, result.output
    # eval_mig.py takes every file of the folder, and what follows the last "_" for the number
    assert {path.name for path in (export / "gligen").iterdir()} == {"mig_7.png", "mig_11.png"}
    assert (export / "gligen" / "mig_7.png").read_bytes() == (out / "gligen" / "7.png").read_bytes()
    assert (export / "mig_bench.json").read_bytes() == layouts.read_bytes()
    assert "| COCO-MIG instance success ratio | 0.250 |" in result.stdout
    assert "scores of gligen: metric_eval.json" in result.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "fid"], "it needs 257 images"),
        (["--method", "dalle"], "unknown method"),
        (["--compare", "hcma"], "a comparison reads"),
        (["--compare", "hcma,sd", "--method", "hcma"], "not in the run"),
        (["--stage", "dream"], "unknown stage"),
        (["--shard", "1/2", "--stage", "report"], "whole run"),
        (["--data", "imagenet"], "unknown data"),
        (["--data", "coco-mig=missing.json"], "cannot read this file"),
        (["--export", "there"], "scorer of their own"),
        (["--scores", "hcma=m.json"], "scorer of their own"),
        (["--metric", "detector"], "no network"),
        (["--method", "boxdiff", "--attention-factor", "4"], "factors 2"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    more: list[str], message: str, random_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    metrics = [] if "--metric" in more else list(METRICS)
    result = run(random_checkpoint, out, *metrics, *more)
    assert isinstance(result.exception, (UsageError, InputError)), result.output
    assert message in str(result.exception)
    assert not out.exists()


def test_a_manifest_of_other_words_has_nothing_to_measure_with(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "a", "prompt": "a yak", "phrases": ["yak"], "boxes": [[0,0,1,1]]}\n')
    command = ["eval", "--model", str(random_checkpoint), "--manifest", str(path)]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, UsageError) and "measure with" in str(result.exception)
