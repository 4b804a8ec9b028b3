"""The model that a sidecar names: nothing is fetched unasked, and its hash is compared first."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the process asks the network for; it gets nothing."""
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments[-1])
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.fixture
def sidecar(cli: Any, random_checkpoint: Path) -> Path:
    """A sidecar of ``random_checkpoint``, in the folder ``out``."""
    result = cli(
        *("generate", "--model", random_checkpoint, "--backend", "eager", "--steps", 2),
        *("--prompt", "a", "--seed", 3, "--out", "out"),
    )
    assert result.code == 0, result.err
    return Path("out/a-3.json")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class Hub:
    """Stands for the hub's client: delivers one folder, or what its cache has."""

    def __init__(self, folder: Path, cached: bool) -> None:
        self.folder, self.cached = folder, cached
        self.downloads: list[str] = []

    def snapshot_download(self, name: str, *, local_files_only: bool, **_: object) -> str:
        if not local_files_only:
            self.downloads.append(name)
        elif not self.cached:
            raise FileNotFoundError(name)
        return str(self.folder)


def test_a_strangers_sidecar_asks_nobody(cli: Any, sidecar: Path, asked: list[object]) -> None:
    for model in ("stranger/model", "stranger/model@main", "a/" + "b" * 90):
        change(sidecar, model=model)
        result = cli("generate", "--from-sidecar", sidecar, "--out", "again")
        result.failed(3, "not on this machine", model[:20], "--allow-download", "--model")
    # no hub id: other words, and nobody is asked either
    for model in ("absent", "/absent/model", "x" * 5000, "a/" + "b" * 5000, "~nobody/x", "a\0b"):
        change(sidecar, model=model)
        cli("generate", "--from-sidecar", sidecar, "--out", "again").failed(3)
        change(sidecar, model="stranger/model", aligner=model)
        cli("generate", "--from-sidecar", sidecar, "--out", "again").failed(3)
        change(sidecar, aligner=None)
    assert asked == [] and not Path("again").exists()


def test_the_user_may_allow_it(
    cli: Any, sidecar: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(sidecar, model="owner/model")
    again = ("generate", "--from-sidecar", sidecar, "--force", "--out", "again")
    for cached, options, downloads in (
        (False, ["--allow-download"], ["owner/model"]),
        (True, [], []),
        (False, ["--model", "mine/model"], ["mine/model"]),
    ):
        hub = Hub(random_checkpoint, cached)
        monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
        result = cli(*again, *options)
        assert result.code == 0, result.err
        assert set(hub.downloads) == set(downloads)
        assert Path("again/a-3.png").read_bytes() == Path("out/a-3.png").read_bytes()
        record = json.loads(Path("again/a-3.json").read_text())
        assert record["model"] == (downloads or ["owner/model"])[0]
    cli("generate", "--prompt", "a", "--allow-download").failed(2, "--from-sidecar")


def test_the_hash_is_compared_before_a_file_is_understood(
    cli: Any,
    sidecar: Path,
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Path(shutil.copytree(random_checkpoint, tmp_path / "other"))
    (other / "unet/config.json").write_text('{"auto_map": "evil"')
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", Hub(other, cached=True).snapshot_download
    )
    for model in (str(other), "owner/model"):
        change(sidecar, model=model)
        result = cli("generate", "--from-sidecar", sidecar, "--out", "again")
        result.failed(3, "hash differs")
    # nor is an engine folder opened; its files, which would take long to build, do not matter here
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "manifest.json").write_text("{}")
    change(sidecar, model=str(engine))
    opened: list[object] = []
    monkeypatch.setattr(
        "hcma_fast.export.manifest.read_manifest", lambda _: SimpleNamespace(weights_hash="0" * 64)
    )
    monkeypatch.setattr(
        "hcma_fast.runtime.pipeline.HCMAPipeline.from_pretrained", lambda *a, **_: opened.append(a)
    )
    result = cli("generate", "--from-sidecar", sidecar, "--out", "again")
    result.failed(3, "hash differs")
    assert opened == [] and not Path("again").exists()


def test_a_sidecar_with_a_byte_order_mark(cli: Any, sidecar: Path) -> None:
    sidecar.write_bytes(b"\xef\xbb\xbf" + sidecar.read_bytes())
    assert cli("generate", "--from-sidecar", sidecar, "--out", "again").code == 0
