"""Models on the hub: revisions, and repositories with pickles only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.hub import is_hub_id
from hcma_fast.models.checkpoint.info import resolve


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was asked of the hub, which has one repository without safetensors of the UNet."""
    calls: list[tuple[str, dict[str, Any]]] = []
    for part, name in (("unet", "x.bin"), ("vae", "x.safetensors"), ("text_encoder", "x.bin")):
        (tmp_path / "snapshot" / part).mkdir(parents=True)
        (tmp_path / "snapshot" / part / name).write_bytes(b"")

    def snapshot_download(name: str, **given: Any) -> str:
        calls.append((name, given))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_revisions_and_pickles(asked: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    assert resolve("someone/model@refs/pr/2", offline=True) == tmp_path / "snapshot"
    assert [name for name, _ in asked] == ["someone/model"] * 2
    for _, given in asked:
        assert given["revision"] == "refs/pr/2" and given["local_files_only"] is True
    assert not any(pattern.endswith(".bin") for pattern in asked[0][1]["allow_patterns"])
    # then those alone that are missing
    assert asked[1][1]["allow_patterns"] == ["unet/*.bin", "text_encoder/*.bin"]
    asked.clear()
    resolve("someone/model")
    assert all("revision" not in given for _, given in asked)
    for wrong in ("someone/model@", "someone/model@-x", "someone/model@a b"):
        with pytest.raises(WeightsError, match="no revision"):
            resolve(wrong)


def test_what_reads_as_a_hub_id() -> None:
    for name, expected in (
        ("owner/name", True),
        ("owner/name@main", True),
        ("owner/name@refs/pr/2", True),
        ("name", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("a/b/c", False),
    ):
        assert is_hub_id(name) == expected, name
