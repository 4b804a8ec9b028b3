"""``hcma-fast bench quality``: table, JSON, contact sheets and bad input."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from hcma_fast.cli.bench.command import bench_app
from hcma_fast.errors import UsageError


def arguments(checkpoint: Path, tmp_path: Path) -> list[str]:
    few = ["--backend", "eager", "--count", "2", "--steps", "2", "--work", str(tmp_path / "work")]
    return ["quality", "--model", str(checkpoint), *few]


def test_several_settings_make_a_table_and_a_sheet_each(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    grid = tmp_path / "grid.png"
    settings = ["--eta0", "0", "--eta0", "0.5", "--guidance-scale", "3", "--grid", str(grid)]
    result = CliRunner().invoke(bench_app, [*arguments(random_checkpoint, tmp_path), *settings])
    assert result.exit_code == 0, result.output
    assert "\n| 0 | 3 | " in result.stdout and "\n| 0.5 | 3 | " in result.stdout
    assert "| real renders |" in result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 5 and {line.count("|") for line in table} == {8}
    assert table[0].endswith("| recognised by likeness |")
    assert "\nRecognised by likeness: " in result.stdout
    assert not grid.exists()
    for number in (1, 2):
        with Image.open(tmp_path / f"grid-{number}.png") as sheet:
            assert sheet.size == (2 * 192, 192)


def test_json_holds_a_report_per_setting_and_a_second_run_reuses_images(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    command = [*arguments(random_checkpoint, tmp_path), "--json"]
    first = CliRunner().invoke(bench_app, command)
    assert first.exit_code == 0, first.output
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    second = CliRunner().invoke(bench_app, command)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == kept
    assert len(kept) == 1
    (before,), (after,) = json.loads(first.stdout), json.loads(second.stdout)
    assert before.pop("date") <= after.pop("date")
    assert before == after
    assert before["count"] == 2 and before["all_boxes"]["total"] > 0


def test_training_scenes_are_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    command = [*arguments(random_checkpoint, tmp_path), "--split", "train"]
    result = CliRunner().invoke(bench_app, command)
    assert isinstance(result.exception, UsageError)
    assert "held-out" in str(result.exception)
