"""The offline table: compiled for real, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hcma_fast.bench.estimates import kernel_resources as kernels
from hcma_fast.bench.estimates.kernel_resources import (
    CASES,
    MAX_BYTES_RATIO,
    kernels_markdown,
    offline_table,
)
from hcma_fast.errors import BackendError, UsageError
from hcma_fast.kernels import launch

DOC = Path(__file__).parents[2] / "docs" / "kernels-offline.md"


def test_kernels_compile_without_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen: list[str] = []
    report = offline_table(architectures=(75, 90), dtypes=["float16"], progress=seen.append)
    assert [(row.kernel, row.arch) for row in report.rows] == [
        (k, a) for k in CASES for a in (75, 90)
    ]
    assert seen == [f"{kernel} float16" for kernel in CASES]
    for row in report.rows:
        assert row.spill_bytes == 0, row
        assert 16 <= row.registers < 255, row
    committed, table = DOC.read_text(), kernels_markdown(report)
    assert table.count("| float16 |") == 2 * len(CASES)
    if f"triton {launch.triton.__version__}," in committed:
        for row in report.rows:
            pattern = rf"^\| {row.kernel} \| float16 \| {row.warps} \|.*"
            (line,) = re.findall(pattern, committed, re.MULTILINE)
            # otherwise the committed table is stale
            assert f" {row.registers} / {row.shared_bytes} |" in line


def test_committed_table_is_whole_and_its_bytes_are_current() -> None:
    committed = DOC.read_text()
    assert all(f"sm_{arch}" in committed for arch in kernels.ARCHITECTURES)
    for kernel, case in CASES.items():
        for name in kernels.DTYPES:
            _, traffic = case(getattr(torch, name), 1)
            assert traffic.minimum <= traffic.moved <= MAX_BYTES_RATIO * traffic.minimum
            ratio = f"{traffic.moved / traffic.minimum:.3f}"
            row = f"| {kernel} | {name} | {traffic.moved} | {traffic.minimum} | {ratio} |"
            assert row in committed
            (line,) = re.findall(
                rf"^\| {kernel} \| {name} \| \d+ \| .* / .*", committed, re.MULTILINE
            )
            assert line.endswith("| 0 |")


@pytest.mark.parametrize(
    "wrong", [{"architectures": [70]}, {"dtypes": ["int8"]}, {"kernels": ["x"]}]
)
def test_unknown_choices_are_refused(wrong: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError, match="Choose from"):
        offline_table(**wrong)  # type: ignore[arg-type]


def test_without_triton_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "triton", None)
    with pytest.raises(BackendError, match="pip install"):
        offline_table(kernels=["align_update"])
