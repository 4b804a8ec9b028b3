"""Stage 2: what moves and what stays, killed runs, parts of a batch, the export, errors."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.errors import HcmaError, InputError, OutputError, UsageError, WeightsError
from hcma_fast.models.checkpoint.info import CheckpointInfo, read_info, write_info
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.train.data.latent_cache import LatentCache
from hcma_fast.train.denoiser.settings import DenoiserTraining
from hcma_fast.train.denoiser.train import train_denoiser
from hcma_fast.train.loop.loop import DivergenceError
from hcma_fast.train.loop.samples import SamplePlan, plan_samples

from training_runs import (
    configured_accelerate,
    one_thread,
    plain_descent,
    records,
    run_as_process,
    same,
    untimed,
)

#: 51 images in the train part: 3 steps an epoch, 6 in all
TRAINING = DenoiserTraining(
    epochs=2,
    batch=16,
    micro_batch=8,
    lr=1e-3,
    warmup=2,
    clip_norm=1.0,
    ema_decay=0.9,
    log_every=2,
    checkpoint_every=2,
    tensorboard=False,
)
OPTIONS = ("progress", "aligner", "sample_every")
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"

#: four micro-batches a step; the gradient's scale shows in the weights
DESCENT = {
    "micro_batch": 4, "plain_descent": True, "clip_norm": None, "weight_decay": 0.0, "lr": 0.1
}  # fmt: skip


def run(model: Path, cache: Path, data: Path, out: Path, **changes: Any) -> Path:
    options = {name: changes.pop(name) for name in OPTIONS if name in changes}
    descends = changes.pop("plain_descent", False)
    training = TRAINING.model_copy(update=changes)
    with plain_descent(wanted=descends):
        return train_denoiser(model, cache, data, out, training, cpu=True, **options)


@pytest.fixture(scope="module")
def uninterrupted(inputs: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    with one_thread():
        run(*inputs, out)
    return out


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def is_grounding(name: str) -> bool:
    return ".fuser." in name or name.startswith("position_net.")


def test_only_the_grounding_layers_move_and_the_export_is_a_model(
    inputs: tuple[Path, ...], uninterrupted: Path
) -> None:
    folder = uninterrupted / "denoiser"
    before, after = load_file(inputs[0] / UNET), load_file(folder / UNET)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if is_grounding(name)}
    # every other file is the model's own
    theirs = {p.relative_to(inputs[0]): p.read_bytes() for p in inputs[0].rglob("*.*")}
    ours = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}
    assert {p for p in theirs.keys() | ours.keys() if theirs.get(p) != ours.get(p)} == {
        UNET,
        Path("training.json"),
    }
    assert not list(uninterrupted.glob(".*"))

    pipe, plain = (HCMAPipeline.from_pretrained(str(f)) for f in (folder, inputs[0]))
    layout = Layout(["a"], [[0.1, 0.2, 0.7, 0.9]])
    images = [
        p("a b", layout, num_inference_steps=2, seed=0, output_type="np").images
        for p in (pipe, plain)
    ]
    assert images[0].shape == images[1].shape and not np.array_equal(*images)


def test_the_best_is_exported_and_the_log_says_why(uninterrupted: Path) -> None:
    found = records(uninterrupted / "denoiser-run")
    train = [record for record in found if record["part"] == "train"]
    val = [record for record in found if record["part"] == "val"]
    assert [record["step"] for record in train] == [2, 3, 4, 6]
    assert [record["step"] for record in val] == [3, 6]
    assert val[1]["loss"] < val[0]["loss"] == val[0]["mse"]
    for record in train:
        assert len(record["mse_by_t"]) == 10 and record["mse_aligned"] is not None
    assert train[0]["lr"] == pytest.approx(1e-3)
    noted = json.loads((uninterrupted / "denoiser" / "training.json").read_text())
    assert noted["step"] == 6 and noted["val"]["loss"] == val[1]["loss"]
    assert same(*(uninterrupted / name / UNET for name in ("denoiser", "denoiser-last")))
    states = sorted(path.name for path in (uninterrupted / "denoiser-run" / "states").iterdir())
    assert states == ["step-00000004.pt", "step-00000006.pt"]
    # of the UNet a state holds what is trained
    content = torch.load(uninterrupted / "denoiser-run" / "states" / states[0], weights_only=True)[
        "model"
    ]
    whole = load_file(uninterrupted / "denoiser" / UNET)
    assert sum(v.numel() for v in content.values()) == sum(
        value.numel() for name, value in whole.items() if is_grounding(name)
    )


# the loop's own test, tests/train/loop, kills processes, which start faster than these
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(
    inputs: tuple[Path, ...], uninterrupted: Path, tmp_path: Path, real: bool
) -> None:
    def stop(done: int, *_: object) -> None:
        if done == 5:
            raise KeyboardInterrupt

    # after the first export and a state, with a step behind it that is done again
    if real:
        killed = run_as_process(__file__, 5, (*inputs, tmp_path))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    else:
        with pytest.raises(KeyboardInterrupt):
            run(*inputs, tmp_path, progress=stop)
    assert (tmp_path / "denoiser").is_dir() and not (tmp_path / "denoiser-last").exists()
    # killed while it exported: what it left is no model, and goes
    (tmp_path / ".denoiser-last.1.part").mkdir()
    (tmp_path / "denoiser" / "unet" / ".weights.1.part").touch()
    first: list[int] = []
    run(*inputs, tmp_path, progress=lambda done, *_: first.append(done))
    assert first == [5, 6]
    for name in ("denoiser", "denoiser-last"):
        assert same(tmp_path / name / UNET, uninterrupted / name / UNET)
    assert not list(tmp_path.rglob(".*"))
    assert untimed(tmp_path / "denoiser-run")[-2:] == untimed(uninterrupted / "denoiser-run")[-2:]


def test_accelerate_is_configured_by_the_settings_alone(
    inputs: tuple[Path, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    with configured_accelerate():
        run(*inputs, tmp_path)
    for name in ("denoiser", "denoiser-last"):
        assert same(tmp_path / name / UNET, uninterrupted / name / UNET)


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates(inputs: tuple[Path, ...], tmp_path: Path) -> None:
    # one process takes all four micro-batches of a step, of two each takes two
    alone, both = tmp_path / "one", tmp_path / "two"
    run(*inputs, alone, **DESCENT)
    head = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29619"]
    done = run_as_process(__file__, -1, (*inputs, both), head, **DESCENT)
    assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = (untimed(folder / "denoiser-run") for folder in (both, alone))
    for a, b in zip(found, wanted, strict=True):
        assert (a["step"], a["part"]) == (b["step"], b["part"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    ours, theirs = (load_file(f / "denoiser-last" / UNET) for f in (both, alone))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-3)


def test_checkpointing_and_workers_leave_the_weights_as_they_are(
    inputs: tuple[Path, ...], tmp_path: Path
) -> None:
    outs = tmp_path / "plain", tmp_path / "thrifty"
    common = {"max_steps": 1, "trainable": "all", "ema_decay": 0.0}
    run(*inputs, outs[0], **common)
    run(*inputs, outs[1], gradient_checkpointing=True, workers=1, **common)
    assert same(*(out / "denoiser-last" / UNET for out in outs))
    before, after = load_file(inputs[0] / UNET), load_file(outs[0] / "denoiser-last" / UNET)
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
    # a run goes on with everything that it trains
    run(*inputs, outs[0], **(common | {"max_steps": 2}))
    assert records(outs[0] / "denoiser-run")[-1]["step"] == 2


def test_samples_along_the_way_leave_the_weights_as_they_are(
    inputs: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*arguments: Any) -> SamplePlan:
        return replace(plan_samples(*arguments, count=1), num_inference_steps=2)

    monkeypatch.setattr("hcma_fast.train.denoiser.train.plan_samples", plan)
    outs = tmp_path / "plain", tmp_path / "drawn"
    run(*inputs, outs[0], max_steps=3)
    run(*inputs, outs[1], max_steps=3, sample_every=1)
    assert same(*(out / "denoiser-last" / UNET for out in outs))
    sheets = sorted((outs[1] / "denoiser-run" / "samples").iterdir())
    assert [path.name for path in sheets] == [f"step-{step:08d}.png" for step in (1, 2, 3)]
    # the weights move, and so do the pictures
    assert len({path.read_bytes() for path in sheets}) == 3


def test_a_loss_that_is_not_finite_stops_and_saves_the_batch(
    inputs: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LatentCache.batch

    def batch(self: LatentCache, indices: Any, *draws: Any) -> Any:
        found = plain(self, indices, *draws)
        if draws:
            found.mean[np.asarray(found.image_ids) == 7] = float("nan")
        return found

    monkeypatch.setattr(LatentCache, "batch", batch)
    with pytest.raises(DivergenceError, match="is not finite"):
        run(*inputs, tmp_path)
    (path,) = (tmp_path / "denoiser-run").glob("bad-batch-*.safetensors")
    saved = load_file(path)
    bad = ~torch.isfinite(saved["mean"]).flatten(1).all(1)
    assert saved["image_ids"][bad].tolist() == [7]
    assert not (tmp_path / "denoiser").exists()


def changed(source: Path, target: Path, what: str) -> dict[str, Any]:
    """A copy of a model, data or cache that does not fit any more: how a run is given it."""
    if what.startswith("data"):
        shutil.copytree(source, target)
        path = target / "annotations" / "captions_train.json"
        if what == "data: gone":
            path.unlink()
        elif what == "data: half":
            path.with_name("instances_train.json").unlink()
        else:
            path.write_text(path.read_text().replace('"caption": "', '"caption": "not ', 1))
        return {"data": target}
    shutil.copytree(source, target)
    if what == "model: another VAE":
        vae = target / "vae" / "diffusion_pytorch_model.safetensors"
        values = load_file(vae)
        values["encoder.conv_in.weight"] += 1
        save_file(values, vae, {"format": "pt"})
    elif what == "model: not gated":
        config = load_part(UNet2DConditionModel, target / "unet").config
        UNet2DConditionModel.from_config({**config, "attention_type": "default"}).save_pretrained(
            target / "unet"
        )
    elif what == "model: no aligner":
        shutil.rmtree(target / "aligner")
    elif what == "model: a foreign aligner":
        note = {"cache": "", "vae_sha256": "0", "text_sha256": "0", "architecture": {}}
        (target / "aligner" / "training.json").write_text(json.dumps({**note, "training": {}}))
    else:
        info = read_info(target)
        assert info is not None
        still = info.alignment.model_copy(update={"eta0": 0.0})
        write_info(target, CheckpointInfo(**(info.model_dump() | {"alignment": still})))
    return {"model": target}


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("data: gone", InputError, "cannot read the annotations"),
        ("data: half", InputError, "cannot read the annotations"),
        ("data: others", InputError, "made from other annotations"),
        ("model: another VAE", WeightsError, "its encoders differ"),
        ("model: not gated", WeightsError, "no gated attention"),
        ("model: no aligner", WeightsError, "has no aligner"),
        ("model: a foreign aligner", WeightsError, "trained with another encoder"),
        ("model: eta0 is 0", UsageError, "eta0 is 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    inputs: tuple[Path, ...], tmp_path: Path, what: str, kind: type[HcmaError], words: str
) -> None:
    model, cache, data = inputs
    given: dict[str, Any] = {"model": model, "cache": cache, "data": data}
    given |= changed(data if what.startswith("data") else model, tmp_path / "copy", what)
    with pytest.raises(kind, match=words):
        run(**given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rate_of_its_own_goes_into_the_export(inputs: tuple[Path, ...], tmp_path: Path) -> None:
    common = {"max_steps": 1, "batch": 8, "aligned_share": 1.0, "eta0": 0.25}
    best = run(*inputs, tmp_path, **common)
    info, before = read_info(best), read_info(inputs[0])
    assert info is not None and before is not None
    assert info.alignment == before.alignment.model_copy(update={"eta0": 0.25})


def test_batches_and_folders_that_do_not_fit(inputs: tuple[Path, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of micro-batch x processes"):
        run(*inputs, tmp_path, batch=20)
    with pytest.raises(UsageError, match="less than one batch"):
        run(*inputs, tmp_path, batch=64)
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "denoiser" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="would be overwritten"):
        run(*inputs, tmp_path)
    assert (tmp_path / "denoiser" / "thesis.txt").read_text() == "mine"


def test_a_run_goes_on_only_with_what_it_was_begun_with(
    inputs: tuple[Path, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs[0] / "aligner", tmp_path / "aligner")
    run(*inputs, tmp_path, max_steps=1, aligner=tmp_path / "aligner")
    with pytest.raises(WeightsError, match=r"begun with aligned_share = 0\.5, not 0\.25"):
        run(*inputs, tmp_path, max_steps=2, aligned_share=0.25)
    shutil.copyfile(tmp_path / "aligner" / "config.json", tmp_path / "aligner" / "other.json")
    with pytest.raises(OutputError, match="not of this run"):
        run(*inputs, tmp_path, max_steps=2, aligner=tmp_path / "aligner")
