"""Stage 1: a killed run ends with the same bits, n processes do what one does, errors are named."""

from __future__ import annotations

import errno
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hcma_fast.config import AlignerConfig
from hcma_fast.errors import InputError, OutputError, UsageError, WeightsError
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.train.aligner.settings import AlignerTraining, architecture, check_fits
from hcma_fast.train.aligner.train import train_aligner
from hcma_fast.train.data.latent_cache import LatentCache, read_header
from hcma_fast.train.loop.loop import DivergenceError
from hcma_fast.train.loop.run_folder import check_provenance

from training_runs import (
    configured_accelerate,
    one_thread,
    plain_descent,
    records,
    run_as_process,
    same,
    untimed,
)

CONFIG = AlignerConfig(
    latent_size=8, patch_size=2, token_width=16, width=32, depth=2, heads=2, text_width=16
)
#: 51 images in the train part: 3 steps an epoch, 9 in all
TRAINING = AlignerTraining(
    epochs=3,
    batch=16,
    micro_batch=8,
    warmup=2,
    cosine=True,
    clip_norm=1.0,
    ema_decay=0.9,
    log_every=2,
    checkpoint_every=2,
    tensorboard=False,
)

#: four micro-batches a step; the gradient's scale shows in the weights
DESCENT = {
    "micro_batch": 4, "plain_descent": True, "clip_norm": None, "weight_decay": 0.0, "lr": 0.1
}  # fmt: skip


def run(cache: Path, out: Path, config: AlignerConfig = CONFIG, **changes: Any) -> Path:
    torch.manual_seed(0)
    progress = changes.pop("progress", lambda *_: None)
    descends = changes.pop("plain_descent", False)
    training = TRAINING.model_copy(update=changes)
    with plain_descent(wanted=descends):
        return train_aligner(cache, out, training, Aligner(config), cpu=True, progress=progress)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log(out: Path) -> list[dict[str, Any]]:
    return records(out / "aligner-run")


@pytest.fixture(scope="module")
def uninterrupted(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with one_thread():
        run(small_cache, out)
    return out


@pytest.fixture(autouse=True)
def on_one_thread() -> Any:
    with one_thread():
        yield


def test_it_learns_logs_and_exports(small_cache: Path, uninterrupted: Path) -> None:
    found = log(uninterrupted)
    train = [record for record in found if record["part"] == "train"]
    val = [record for record in found if record["part"] == "val"]
    assert [record["step"] for record in train] == [2, 3, 4, 6, 8, 9]
    assert [record["step"] for record in val] == [3, 6, 9]
    assert train[-1]["loss"] < train[0]["loss"]
    for record in train:
        assert 0 <= record["data_wait_share"] <= 1 and record["samples_per_second"] > 0
        assert len(record["global_by_t"]) == len(record["region_r1_by_t"]) == 10
    assert train[0]["lr"] == pytest.approx(1e-3)

    # as generate and build take it
    header = LatentCache(small_cache).header
    base = {"vae_sha256": header.vae_sha256, "text_sha256": header.text_sha256}
    exported = Aligner.from_pretrained(uninterrupted / "aligner").config
    assert exported == CONFIG.model_copy(update=base)
    provenance = json.loads((uninterrupted / "aligner" / "training.json").read_text())
    assert provenance["cache"] == read_header(small_cache).digest
    assert Aligner.from_pretrained(uninterrupted / "aligner-last").config == exported
    # the newest two states are kept
    states = sorted(path.name for path in (uninterrupted / "aligner-run" / "states").iterdir())
    assert states == ["step-00000008.pt", "step-00000009.pt"]


def test_the_best_by_the_val_part_is_exported_though_it_is_not_the_last(
    small_cache: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    aligner = Aligner(CONFIG)
    ends: dict[int, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def progress(done: int, total: int, record: object) -> None:
        ends[done] = {name: value.clone() for name, value in aligner.state_dict().items()}
        if done == 8:
            # before the last step: features point the other way, so cosines change their sign
            for layer in (aligner.caption_head[-1], aligner.region_head.project[-1]):
                layer.weight.neg_()
                layer.bias.neg_()

    training = TRAINING.model_copy(update={"ema_decay": 0.0})
    train_aligner(small_cache, tmp_path, training, aligner, cpu=True, progress=progress)
    val = {record["step"]: record for record in log(tmp_path) if record["part"] == "val"}
    best = min(val, key=lambda step: val[step]["loss"])
    assert best in (3, 6) and val[9]["loss"] > val[best]["loss"] + 0.01
    for folder, step in (("aligner", best), ("aligner-last", 9)):
        stored = weights(tmp_path / folder)
        assert stored.keys() == ends[step].keys()
        assert all(torch.equal(value, ends[step][name]) for name, value in stored.items())
    provenance = json.loads((tmp_path / "aligner" / "training.json").read_text())
    assert provenance["step"] == best and provenance["val"]["loss"] == val[best]["loss"]


# the loop's own test, tests/train/loop, kills processes, which start faster than these
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop", [4, 5, 7])
def test_kill_and_resume_is_bitwise_the_same(
    small_cache: Path, uninterrupted: Path, tmp_path: Path, stop: int, real: bool
) -> None:
    if not real:

        def progress(done: int, total: int, record: object) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(small_cache, tmp_path, progress=progress)
        if stop == 7:
            # killed while it wrote the last record, of which the line's end is missing
            log_file = tmp_path / "aligner-run" / "log.jsonl"
            content = log_file.read_bytes()
            assert content.endswith(b"}\n")
            log_file.write_bytes(content[:-1])
    else:
        done = run_as_process(__file__, stop, (small_cache, tmp_path))
        assert done.returncode == -signal.SIGKILL, done.stderr
    if stop == 5:
        states = tmp_path / "aligner-run" / "states"
        # killed while it wrote: the half has another name
        content = (states / "step-00000004.pt").read_bytes()
        (states / ".step-00000005.pt.1.part").write_bytes(content[:1000])
        with (tmp_path / "aligner-run" / "log.jsonl").open("a") as file:
            file.write('{"part": "train", "st')
    assert not (tmp_path / "aligner-last").exists()
    first: list[int] = []
    run(small_cache, tmp_path, progress=lambda done, *_: first.append(done))
    assert first[0] == {4: 5, 5: 5, 7: 7}[stop] and first[-1] == 9
    for name in ("aligner", "aligner-last"):
        file = Path(name) / "model.safetensors"
        assert same(tmp_path / file, uninterrupted / file)
    # losses of a window that the stop cut in two are of its second half
    steps = [record["step"] for record in log(tmp_path)]
    assert steps == [record["step"] for record in log(uninterrupted)]
    assert not list(tmp_path.rglob(".*.part"))
    work = Path("aligner-run")
    assert untimed(tmp_path / work)[-2:] == untimed(uninterrupted / work)[-2:]


def test_a_finished_run_does_nothing(small_cache: Path, uninterrupted: Path) -> None:
    before = log(uninterrupted)

    def never(*_: object) -> None:
        raise AssertionError("no step is left")

    assert run(small_cache, uninterrupted, progress=never) == uninterrupted / "aligner"
    assert log(uninterrupted) == before


def test_accelerate_is_configured_by_the_settings_alone(
    small_cache: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    with configured_accelerate():
        run(small_cache, tmp_path)
    for name in ("aligner", "aligner-last"):
        file = Path(name) / "model.safetensors"
        assert same(tmp_path / file, uninterrupted / file)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_are_one_that_accumulates(
    small_cache: Path, tmp_path: Path, launcher: str
) -> None:
    # one process takes all four micro-batches of a step, of two each takes two
    alone, both = tmp_path / "one", tmp_path / "two"
    run(small_cache, alone, **DESCENT)
    if launcher == "torchrun":
        head = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    else:
        head = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        head += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        head += ["--main_process_port", "29618"]
    done = run_as_process(__file__, -1, (small_cache, both), head, **DESCENT)
    assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = (untimed(folder / "aligner-run") for folder in (both, alone))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a["step"], a["part"]) == (b["step"], b["part"])
        for name in ("loss", "global", "local"):
            assert a[name] == pytest.approx(b[name], abs=1e-5)
    ours, theirs = weights(both / "aligner-last"), weights(alone / "aligner-last")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-5)


def test_without_average_and_with_plain_settings(small_cache: Path, tmp_path: Path) -> None:
    plain = {"ema_decay": 0.0, "clip_norm": None, "cosine": False, "warmup": 0, "bf16": True}
    run(small_cache, tmp_path, max_steps=3, tensorboard=True, workers=1, **plain)
    (first, *_, last) = log(tmp_path)
    assert first["lr"] == 1e-3 and math.isfinite(last["loss"])
    assert list((tmp_path / "aligner-run" / "tensorboard").iterdir())
    # at a constant rate a run can be made longer
    run(small_cache, tmp_path, max_steps=5, **plain)
    assert log(tmp_path)[-1]["step"] == 5


def test_validation_draws_the_same_each_time(small_cache: Path, tmp_path: Path) -> None:
    # a rate too small to move float32 weights
    run(small_cache, tmp_path, lr=1e-30, weight_decay=0.0, warmup=0, cosine=False)
    losses = [record["loss"] for record in log(tmp_path) if record["part"] == "val"]
    assert len(losses) == 3 and len(set(losses)) == 1


def poison(monkeypatch: pytest.MonkeyPatch, number: int, *, held_out: bool = False) -> None:
    """Make the caption of one image NaN, as a damaged cache would.

    Args:
        held_out: the image is of the val part.
    """
    plain = LatentCache.batch

    def batch(self: LatentCache, indices: Any, *draws: Any) -> Any:
        found = plain(self, indices, *draws)
        if bool(draws) is not held_out:
            found.caption[np.asarray(found.image_ids) == number] = float("nan")
        return found

    monkeypatch.setattr(LatentCache, "batch", batch)


def test_a_loss_that_is_not_finite_stops_and_saves_the_batch(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 7)
    with pytest.raises(DivergenceError, match="is not finite") as caught:
        run(small_cache, tmp_path)
    (path,) = (tmp_path / "aligner-run").glob("bad-batch-*.safetensors")
    assert str(path) in str(caught.value)
    saved = load_file(path)
    bad = ~torch.isfinite(saved["caption"]).all(1)
    assert saved["image_ids"][bad].tolist() == [7]
    assert saved["z"].shape == (8, 4, 8, 8) and saved["timesteps"].shape == (8,)


def test_a_validation_loss_that_is_not_finite_stops_and_is_no_best(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LatentCache(small_cache)
    number = int(cache.image_ids[cache.indices_of("val")[0]])
    poison(monkeypatch, number, held_out=True)
    with pytest.raises(DivergenceError, match="the validation loss of step 3 is not finite"):
        run(small_cache, tmp_path)
    (path,) = (tmp_path / "aligner-run").glob("bad-batch-3-*.safetensors")
    assert number in load_file(path)["image_ids"].tolist()
    # the state before it is there to go on from, and nothing was exported
    states = [path.name for path in (tmp_path / "aligner-run" / "states").iterdir()]
    assert states == ["step-00000002.pt"] and not (tmp_path / "aligner").exists()
    monkeypatch.undo()
    run(small_cache, tmp_path)
    assert json.loads((tmp_path / "aligner" / "training.json").read_text())["val"]["loss"] > 0


@pytest.mark.parametrize("damage", ["cut", "empty", "code"])
def test_a_damaged_state_is_refused(small_cache: Path, tmp_path: Path, damage: str) -> None:
    run(small_cache, tmp_path, max_steps=2)
    (state,) = (tmp_path / "aligner-run" / "states").iterdir()
    content = state.read_bytes()
    if damage == "code":
        torch.save({"provenance": print}, state)
    else:
        state.write_bytes(content[:3000] if damage == "cut" else b"")
    with pytest.raises(WeightsError, match="cannot be resumed") as caught:
        run(small_cache, tmp_path, max_steps=2)
    assert caught.value.value == str(state) and "\n" not in str(caught.value)


def test_a_run_goes_on_only_with_what_it_was_begun_with(
    small_cache: Path, tmp_path: Path, emoji_coco: Path, encoders: Any
) -> None:
    from hcma_fast.train.data.encode import make_cache

    run(small_cache, tmp_path, max_steps=2)
    with pytest.raises(WeightsError, match="begun with depth = 2, not 3"):
        run(small_cache, tmp_path, CONFIG.model_copy(update={"depth": 3}), max_steps=2)
    with pytest.raises(WeightsError, match=r"begun with lr = 0\.001, not 0\.002"):
        run(small_cache, tmp_path, max_steps=2, lr=2e-3)
    # the cosine's length counts
    with pytest.raises(WeightsError, match="begun with max_steps = 2, not 3"):
        run(small_cache, tmp_path, max_steps=3)
    other = tmp_path / "other-cache"
    make_cache(emoji_coco, "train", encoders, other, flip=False)
    with pytest.raises(WeightsError, match="begun with another cache"):
        run(other, tmp_path, max_steps=2)


def test_a_cache_of_another_encoder_is_refused(
    small_cache: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    header = read_header(small_cache)
    with pytest.raises(WeightsError, match="its latent_size is 64, the cache's 8"):
        check_fits(architecture("sd14"), header, "the aligner")
    with pytest.raises(WeightsError, match="its latent_size is 16"):
        run(small_cache, tmp_path, architecture("tiny"))
    check_provenance(uninterrupted / "aligner", header)
    changed = header.model_copy(update={"vae_sha256": "0" * 64})
    with pytest.raises(WeightsError, match="another encoder") as caught:
        check_provenance(uninterrupted / "aligner", changed)
    assert caught.value.value == str(uninterrupted / "aligner")


def test_batches_that_do_not_fit(small_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of micro-batch x processes"):
        run(small_cache, tmp_path, batch=20)
    with pytest.raises(UsageError, match="less than one batch"):
        run(small_cache, tmp_path, batch=64)


def test_an_empty_part_is_an_error(encoders: Any, tmp_path: Path) -> None:
    from hcma_fast.train.data.emoji_scenes import write_coco
    from hcma_fast.train.data.encode import make_cache

    # ids 0 to 7 are all in the train part
    write_coco(tmp_path / "data", "train", 8, 24)
    make_cache(tmp_path / "data", "train", encoders, tmp_path / "cache")
    with pytest.raises(InputError, match="the val part of this cache is empty"):
        run(tmp_path / "cache", tmp_path / "out", batch=4, micro_batch=4)


def test_a_full_disk_is_named(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        run(small_cache, tmp_path)
    assert str(tmp_path) in str(caught.value.value)
    assert list((tmp_path / "aligner-run" / "states").iterdir()) == []


def test_the_presets() -> None:
    assert architecture("sd14") == AlignerConfig()
    assert AlignerTraining().batch == 1024 and AlignerTraining().epochs == 60
    assert AlignerTraining().lr == 1e-3 and AlignerTraining().weight_decay == 5e-4


def test_the_export_is_an_aligner_for_the_model(
    small_cache: Path, uninterrupted: Path, random_checkpoint: Path
) -> None:
    from hcma_fast.models.checkpoint.folder import load_components

    parts: Components = load_components(random_checkpoint, aligner=uninterrupted / "aligner")
    header = LatentCache(small_cache).header
    base = {"vae_sha256": header.vae_sha256, "text_sha256": header.text_sha256}
    assert parts.own_aligner.config == CONFIG.model_copy(update=base)
