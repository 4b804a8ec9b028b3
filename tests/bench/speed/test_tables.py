"""docs/performance.md holds the tables that its command makes from docs/results."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from hcma_fast.bench.speed.tables import TABLES, main, with_tables
from hcma_fast.errors import InputError

DOCS = Path(__file__).parents[3] / "docs"
PAGE, RESULTS = DOCS / "performance.md", DOCS / "results"


def test_the_page_is_what_the_command_makes(tmp_path: Path) -> None:
    text = PAGE.read_text()
    assert with_tables(text, RESULTS) == text, f"run python -m {main.__module__} {RESULTS} {PAGE}"
    assert sorted(re.findall(r"<!-- table (.*) -->", text)) == sorted(TABLES)
    # figures that someone typed over, and a table that someone removed, come back
    page = tmp_path / "page.md"
    page.write_text(
        re.sub(r"(table soak -->).*?(<!-- end)", r"\1\n\2", text.replace("3.68", "4.68"))
    )
    main([str(RESULTS), str(page)])
    assert page.read_text() == text


def test_a_changed_result_changes_the_page(tmp_path: Path) -> None:
    changed = tmp_path / "results"
    shutil.copytree(RESULTS, changed)
    build = (changed / "build.json").read_text()
    (changed / "build.json").write_text(build.replace('"engine_mib": 64.1', '"engine_mib": 99.1'))
    before, after = (with_tables(PAGE.read_text(), folder) for folder in (RESULTS, changed))
    lines = set(after.splitlines()) - set(before.splitlines())
    assert lines == {"| torch-compile | 197 | 847 | 99 |"}
    assert "--out" not in after, "a folder of the machine that measured"


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such table"):
        with_tables("<!-- table nonesuch -->\n<!-- end -->", RESULTS)
    with pytest.raises(InputError, match="no results"):
        with_tables(PAGE.read_text(), tmp_path)
    (tmp_path / "soak.json").write_text("{}")
    with pytest.raises(InputError, match="soak"):
        with_tables("<!-- table soak -->\n<!-- end -->", tmp_path)
