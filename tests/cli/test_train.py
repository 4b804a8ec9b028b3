"""``hcma-fast train``: from 50 images in COCO's format on disk to models that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress, TaskID

from hcma_fast.cli.app import main
from hcma_fast.cli.output import stderr
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.train.data.emoji_scenes import write_coco
from hcma_fast.train.data.encoders import Encoders
from hcma_fast.train.data.latent_cache import shard_file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, "train", 50)
    # as COCO names it
    (folder / "train").rename(folder / "train2014")
    for kind in ("instances", "captions"):
        path = folder / "annotations" / f"{kind}_train.json"
        path.rename(path.with_stem(f"{kind}_train2014"))
    return folder


@pytest.fixture(scope="module")
def cached(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents")
    assert main(["train", "cache", "--data", str(data), "--out", str(out), "--no-flip"]) == 0
    return out


def test_from_images_to_an_aligner(data: Path, cli: Any, tmp_path: Path) -> None:
    """docs/train.md: fine-tuning the embedded model's aligner on one's own data."""
    latents, out = tmp_path / "latents", tmp_path / "run"
    made = cli("train", "cache", "--data", data, "--model", "tiny", "--out", latents, "--json")
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert report["images"] == report["encoded"] == 50 and report["skipped"] == []

    start = Path(load_components("tiny").source or "") / "aligner"
    options = ["--batch", 20, "--epochs", 2, "--lr", "1e-4", "--log-every", 1]
    command = ["train", "aligner", "--cpu", "--cache", latents, "--out", out]
    command += ["--init", start, *options]
    first = cli(*command)
    assert first.code == 0, first.err
    assert first.out.strip() == str(out / "aligner")
    trained, before = Aligner.from_pretrained(out / "aligner"), Aligner.from_pretrained(start)
    # it says what it was trained with, and is built like the one before
    base = {name: getattr(trained.config, name) for name in ("vae_sha256", "text_sha256")}
    assert None not in base.values()
    assert trained.config == before.config.model_copy(update=base)
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.1
    log = (out / "aligner-run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["part"] for line in log] == ["train", "train", "val"] * 2
    # what it started from knows these scenes: chance would be 1 in 23
    assert json.loads(log[0])["region_r1"] > 0.2
    # a model with the new aligner loads
    assert load_components("tiny", aligner=out / "aligner").own_aligner.config == trained.config
    # the same line again has nothing to do
    assert cli(*command).out == first.out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--data", "nowhere"), 3, ("cannot read the annotations", "nowhere")),
        (("--split", "val2014"), 3, ("instances_val2014.json", "annotations of train2014:")),
        (("--model", "nowhere"), 3, ("no such preset, folder or file",)),
        (("--size", "63"), 3, ("multiple of the VAE's factor, 4", "63")),
        (("--share", "2/2"), 2, ("a share must read I/N", "2/2")),
        (("--device", "cuda:99"), 3, ("this device cannot be used", "cuda:99")),
    ],
)
def test_cache_refuses(
    data: Path, cli: Any, options: tuple[str, str], code: int, words: tuple[str, ...]
) -> None:
    given = {"--data": data, "--out": "latents"} | dict([options])
    cli("train", "cache", *(part for pair in given.items() for part in pair)).failed(code, *words)


def test_bad_images(data: Path, cli: Any, tmp_path: Path) -> None:
    copy = tmp_path / "coco"
    for path in data.rglob("*.*"):
        target = copy / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    broken = copy / "train2014" / f"{3:012d}.png"
    broken.write_bytes(broken.read_bytes()[:100])
    command = ["train", "cache", "--data", copy, "--no-flip", "--out"]
    cli(*command, tmp_path / "strict").failed(3, "cannot read image 3", str(broken), "--skip-bad")
    skipped = cli(*command, tmp_path / "latents", "--skip-bad")
    assert skipped.code == 0 and "49 images" in skipped.out and "1 skipped" in skipped.out
    assert str(broken) in skipped.err.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--preset", "sd14", "--batch", "8"), 3, ("does not fit this cache", "latent_size is 64")),
        (("--batch", "64"), 2, ("less than one batch",)),
        (("--batch", "20", "--micro-batch", "8"), 2, ("multiple of micro-batch",)),
        (("--batch", "8", "--lr", "0"), 2, ("--lr", "greater than 0")),
        (("--init", "nowhere"), 3, ("the aligner cannot be loaded", "nowhere")),
        (("--cache", "nowhere"), 3, ("this is no cache", "nowhere")),
        (("--sample-every", "5"), 2, ("--sample-data",)),
    ],
)
def test_aligner_refuses(
    cached: Path, cli: Any, options: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    given = ("--cpu", "--cache", cached, "--out", "run")
    cli("train", "aligner", *given, *options).failed(code, *words)


def test_time_left_is_of_this_share_and_of_what_is_missing(
    data: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, now = tmp_path / "latents", [0.0]
    command = ["train", "cache", "--data", data, "--out", out, "--no-flip", "--share", "1/2"]
    command += ["--shard-size", 8, "--batch-size", 4]
    # of the 7 shards of 50 images, 1, 3 and 5
    assert cli(*command).code == 0
    for index in (3, 5):
        (out / shard_file(index)).unlink()

    plain_posterior, plain_update = Encoders.posterior, Progress.update
    seen: list[tuple[float, float | None, float | None]] = []

    def posterior(self: Encoders, images: Any) -> Any:
        now[0] += 10
        return plain_posterior(self, images)

    def update(self: Progress, task_id: TaskID, **changes: Any) -> None:
        plain_update(self, task_id, **changes)
        (task,) = self.tasks
        seen.append((task.completed, task.total, task.time_remaining))

    monkeypatch.setattr(stderr, "get_time", lambda: now[0])
    monkeypatch.setattr(Encoders, "posterior", posterior)
    monkeypatch.setattr(Progress, "update", update)
    assert cli(*command).code == 0
    # 4 images in 10 seconds; of a single report no rate is known
    assert seen == [(0, 16, None), (4, 16, None), (8, 16, 20), (12, 16, 10), (16, 16, 0)]


def test_from_a_cache_to_a_denoiser(data: Path, cached: Path, cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", "denoiser", "--cpu", "--model", "tiny", "--cache", cached, "--data", data]
    command += ["--out", out, "--batch", 20, "--micro-batch", 10, "--epochs", 1, "--log-every", 1]
    trained = cli(*command)
    assert trained.code == 0, trained.err
    assert trained.out.strip() == str(out / "denoiser")
    log = (out / "denoiser-run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["part"] for line in log] == ["train", "train", "val"]
    # a denoiser that was trained before: no idea of the noise would have 1
    assert json.loads(log[-1])["mse"] < 0.3
    made, given = load_components(out / "denoiser"), load_components("tiny")
    assert made.info == given.info and made.weights_hash != given.weights_hash
    # build takes it, as tune-alignment would
    plan = cli("build", "--model", out / "denoiser", "--backend", "onnxruntime", "--dry-run")
    assert plan.code == 0, plan.err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--model", "nowhere"), 3, ("no such preset, folder or file",)),
        (("--aligner", "nowhere"), 3, ("no folder of an aligner", "nowhere")),
        (("--cache", "nowhere"), 3, ("this is no cache", "nowhere")),
        (("--data", "nowhere"), 3, ("cannot read the annotations", "nowhere")),
        (("--batch", "64"), 2, ("less than one batch",)),
        (("--eta0", "0"), 2, ("--eta0", "greater than 0")),
    ],
)
def test_denoiser_refuses(
    data: Path, cached: Path, cli: Any, options: tuple[str, str], code: int, words: tuple[str, ...]
) -> None:
    given = {"--model": "tiny", "--cache": cached, "--data": data, "--out": "run"} | dict([options])
    flat = (part for pair in given.items() for part in pair)
    cli("train", "denoiser", "--cpu", *flat).failed(code, *words)
