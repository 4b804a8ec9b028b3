"""What the speed suites report: tables, CSV, and what a row says of the machine and its clocks."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hcma_fast.bench.shared.clocks import Clocks
from hcma_fast.bench.speed.harness.report import (
    COMPILED,
    Row,
    read_results,
    report_markdown,
    rows_csv,
    speedup_over,
)
from hcma_fast.cli.app import main

from bench_rows import MACHINE, make_row, results


def test_csv_has_a_column_for_each_label_and_figure() -> None:
    rows = (
        make_row("a", figures={"engine_mib": 3.5}),
        make_row("b, c", labels={"backend": "x"}, relative_error=None),
    )
    found = list(csv.DictReader(io.StringIO(rows_csv(results(*rows).reports))))
    assert [row["name"] for row in found] == ["a", "b, c"]
    assert found[0]["seconds"] == "2.0 2.0 2.0" and found[0]["engine_mib"] == "3.5"
    assert found[1]["backend"] == "x" and found[1]["batch"] == found[1]["relative_error"] == ""


def test_each_line_of_the_csv_says_where_it_was_measured() -> None:
    machine = MACHINE.model_copy(
        update={"gpu": "A card", "driver": "570.1", "commit": "abc+changes", "clocks": Clocks()}
    )
    rows = (
        make_row("a", clocks=Clocks(cpu_mhz=2000.5, gpu_sm_mhz=1980.0)),
        make_row("b", weights_hash="1" * 64, clocks=Clocks(gpu_sm_mhz=210.0)),
    )
    text = rows_csv(results(*rows, machine=machine, quick=True).reports)
    heads = next(csv.reader(io.StringIO(text)))
    assert len(set(heads)) == len(heads)
    first, second = csv.DictReader(io.StringIO(text))
    for row in (first, second):
        assert (row["gpu"], row["driver"], row["commit"]) == ("A card", "570.1", "abc+changes")
        assert (row["cpu"], row["python"], row["date"]) == (
            *(machine.cpu, machine.python, machine.date),
        )
        assert row["version torch"] == machine.versions["torch"]
        assert (row["quick"], row["cores"]) == ("True", str(machine.cores))
    assert (first["weights_hash"], second["weights_hash"]) == ("0" * 64, "1" * 64)
    assert (first["gpu_sm_mhz"], second["gpu_sm_mhz"]) == ("1980.0", "210.0")
    assert (first["cpu_mhz"], second["cpu_mhz"]) == ("2000.5", "")


def test_the_tables_have_the_range_of_the_clocks() -> None:
    clocks = [
        Clocks(cpu_mhz=mhz, gpu_sm_mhz=1980.0, cpu_governor="performance") for mhz in (2e3, 3e3)
    ]
    rows = [make_row(name, clocks=found) for name, found in zip("ab", clocks, strict=True)]
    page = report_markdown(results(*rows).reports[0])
    assert "cpu_governor performance, cpu_mhz 2000 to 3000, gpu_sm_mhz 1980." in page
    # an older result's rows have none
    assert "Right after" not in report_markdown(results(make_row()).reports[0])


def test_results_from_before_rows_had_clocks_can_be_read(tmp_path: Path) -> None:
    written = results(make_row()).model_dump(mode="json")
    del written["reports"][0]["rows"][0]["clocks"]
    (tmp_path / "old.json").write_text(json.dumps(written))
    assert read_results(tmp_path / "old.json") == results(make_row())


def test_tables_are_even_and_name_what_could_not_run() -> None:
    rows = (
        make_row("a", labels={"batch": 1, "steps": 4}, device_peak_mib=7.0),
        make_row("b", labels={"batch": 2, "steps": 4}, figures={"x": 1.0}),
        make_row("c", "h", relative_error=None, max_error=None, speedup=None),
    )
    page = report_markdown(results(*rows, failed={"g: d": "no such thing"}).reports[0])
    tables = [line for line in page.splitlines() if line.startswith("|")]
    for first, second in pairwise(tables[:4]):
        assert first.count("|") == second.count("|")
    assert "g (steps 4)" in page and "torch on the GPU, peak MiB" in page
    assert "Could not run: g: d: no such thing" in page


def test_runs_of_some_evaluations_make_no_images() -> None:
    some = make_row(labels={"steps": 50, "evaluations": 1})
    assert "| latents/s |" in report_markdown(results(some).reports[0])
    page = report_markdown(results(make_row(labels={"steps": 50})).reports[0])
    assert "| images/s |" in page and "latents/s" not in page


def peers(**changes: Any) -> list[Row]:
    """A plain loop, the compiled one and ours, of three rounds in which the machine drifts."""
    return [
        make_row("plain", seconds=(4.0, 8.0, 12.0)),
        make_row(COMPILED, seconds=(2.0, 6.0, 8.0)),
        make_row("ours", **{"seconds": (1.0, 2.0, 4.0), **changes}),
    ]


def test_ratios_to_the_compiled_loop_are_within_a_round() -> None:
    plain, compiled, ours = peers()
    found = speedup_over(ours, compiled)
    assert found == pytest.approx((2, 2, 2.8))  # of 2, 3 and 2
    assert speedup_over(compiled, compiled) == (1, 1, 1)
    # per image
    assert speedup_over(ours.model_copy(update={"images": 4}), compiled) == pytest.approx(
        (8, 8, 11.2)
    )
    page = report_markdown(results(plain, compiled, ours).reports[0])
    heads = next(line for line in page.splitlines() if COMPILED in line)
    assert f"| against {COMPILED} | p10 to p90 |" in heads
    (line,) = [line for line in page.splitlines() if line.startswith("| ours |")]
    assert "| 2.00 | 2.00 to 2.80 |" in line and line.count("|") == heads.count("|")


@pytest.mark.parametrize(
    "changes",
    [
        {"void": True, "speedup": None, "speedup_interval": None},
        {"max_error": None, "speedup": None, "speedup_interval": None},
        {"group": "other"},
        {"seconds": (1.0,)},
    ],
)
def test_what_has_no_ratio_has_an_empty_cell(changes: dict[str, Any]) -> None:
    plain, compiled, ours = peers(**changes)
    assert speedup_over(ours, compiled) is None and speedup_over(compiled, ours) is None
    page = report_markdown(results(plain, compiled, ours).reports[0])
    (line,) = [line for line in page.splitlines() if line.startswith("| ours |")]
    assert ("|  |  |" in line) == (ours.group == "g")


def test_groups_without_that_row_have_no_such_columns() -> None:
    assert "against" not in report_markdown(results(make_row("plain"), make_row()).reports[0])


def test_finished_results_are_shown_against_any_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(*peers())
    path = str(tmp_path / "bench.json")
    Path(path).write_text(found.model_dump_json())
    assert main(["bench", "show", path]) == 0
    assert capsys.readouterr().out == report_markdown(found.reports[0]) + "\n"
    assert main(["bench", "show", path, "--against", "ours"]) == 0
    shown = capsys.readouterr().out
    assert "| against ours | p10 to p90 |" in shown and COMPILED in shown
    assert main(["bench", "show", path, "--against", "nobody"]) == 2
    assert "Rows: plain; " in capsys.readouterr().err
    assert main(["bench", "show", str(tmp_path / "none.json")]) == 3
