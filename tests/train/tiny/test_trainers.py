"""The commands and programs of `tiny`'s recipe, as they are started, at two steps each."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from hcma_fast.cli.app import main
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.program import run_program
from hcma_fast.train.aligner.settings import architecture
from hcma_fast.train.data.emoji_scenes import render_scene, sample_scene
from hcma_fast.train.data.emoji_scenes2 import SECOND
from hcma_fast.train.data.emoji_scenes2 import render_scene as render_scene2
from hcma_fast.train.data.emoji_scenes2 import sample_scene as sample_scene2
from hcma_fast.train.tiny.latents import SceneLatents
from hcma_fast.train.tiny.unet import MAX_ETA0

SCENES = 24
SMALL = ("--steps", "2", "--batch", "4")
PARTS = {
    "text": "text_encoder",
    "vae": "vae",
    "denoiser": "unet",
    "vae_decoder": "vae-sharp",
}
COMMANDS = {
    "text": ("train", "text"),
    "vae": ("train", "vae"),
    "vae_decoder": ("train", "vae", "--decoder-only"),
}
PROGRAMS = {"denoiser": "unet", "pack": "pack"}


def start(name: str, *options: object) -> int:
    """Run hcma-fast, or a program of ``hcma_fast.train.tiny``, in this process: its exit code."""
    if name in COMMANDS:
        return main([*COMMANDS[name], *map(str, options)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, options)])
        return run_program(importlib.import_module(f"hcma_fast.train.tiny.{PROGRAMS[name]}").main)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, above which libraries may have warned."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


def options_of(name: str, out: Path) -> tuple[object, ...]:
    scenes = () if name == "text" else ("--scenes", SCENES)
    return ("--out", out, *SMALL, *scenes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole recipe, but for the aligner, which is random. Do not modify it."""
    out = tmp_path_factory.mktemp("tiny")
    scenes = [np.asarray(render_scene(sample_scene("train", i), "train", i)) for i in range(SCENES)]
    # drawn here, as the programs' own two processes would take longer than all the rest
    np.save(out / f"scenes-train-{SCENES}-64.npy", np.stack(scenes))
    np.save(out / "scenes-val-500-64.npy", np.stack([scenes[i % SCENES] for i in range(500)]))
    Aligner(architecture("tiny")).save_pretrained(out / "aligner")
    for name in PARTS:
        assert start(name, *options_of(name, out)) == 0
    return out


def test_each_logs_and_leaves_a_part_that_loads(trained: Path, tmp_path: Path) -> None:
    for name, part in PARTS.items():
        state = trained / f"{name.replace('_', '-')}-state"
        (line,) = (state / "log.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == 2 and (state / "state.pt").is_file()
        assert load_file(next((trained / part).glob("*.safetensors")))
    assert not [path for path in trained.iterdir() if path.name.endswith(".part")]
    # latents are scaled to a standard deviation of about 1
    assert load_part(AutoencoderKL, trained / "vae").config.scaling_factor != 0.18215
    # and pack makes one checkpoint of them
    assert (
        start("pack", "--run", trained, "--out", tmp_path, "--eta0", 2, "--window", 0.2, 0.5) == 0
    )
    parts = load_components(tmp_path)
    assert (parts.settings.eta0, parts.settings.window) == (2.0, (0.2, 0.5))


def test_the_second_edition_is_trained_by_the_same_commands(tmp_path: Path) -> None:
    few = [sample_scene2("val", i) for i in range(2)]
    pictures = [np.asarray(render_scene2(scene, "val", i)) for i, scene in enumerate(few)]
    np.save(tmp_path / "scenes2-val-500-128.npy", np.stack(pictures))
    small = ("--out", tmp_path, "--edition", 2, "--steps", 1, "--batch", 2)
    assert start("text", *small) == 0
    assert start("vae", *small) == 0
    vae = load_part(AutoencoderKL, tmp_path / "vae")
    assert vae.config.sample_size == 128
    with Image.open(tmp_path / "vae-state" / "reconstructions.png") as sheet:
        assert sheet.size == (2 * 128, 4 * 2 * 128)
    np.save(tmp_path / "scenes2-val-2-128.npy", np.stack(pictures))
    data = SceneLatents(tmp_path, "val", 2, SECOND)
    batch = data.batch(0, 2)
    assert batch.z0.shape == (2, 4, 16, 16) and data.label_table.shape[0] == len(SECOND.phrases)
    np.save(tmp_path / "scenes2-train-2-128.npy", np.stack(pictures))
    assert start("denoiser", *small, "--scenes", 2) == 0
    unet = load_part(UNet2DConditionModel, tmp_path / "unet")
    assert set(unet.config.down_block_types) == {"CrossAttnDownBlock2D"}
    assert 5 < sum(p.numel() for p in unet.parameters()) / 1e6 < 8
    # what was begun with one edition does not go on with another
    assert start("vae", "--out", tmp_path, "--steps", 1, "--batch", 2, "--scenes", 100000) == 3


def test_only_the_decoder_of_the_vae_is_trained_further(trained: Path) -> None:
    before, after = (
        load_file(trained / part / "diffusion_pytorch_model.safetensors")
        for part in ("vae", "vae-sharp")
    )
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)


@pytest.mark.parametrize("name", PARTS)
def test_a_finished_run_does_nothing(
    trained: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("no step is left"))
    assert start(name, *options_of(name, trained)) == 0
    where = json.dumps({"step": 2, "steps": 2})
    said = capsys.readouterr()
    if name in COMMANDS:
        assert said.out == f"{trained / PARTS[name]}\n"
        assert "Finished before, at step 2 of 2." in said.err
    else:
        assert said.out == f"{where}\n"
    # another batch would be silently ignored
    assert start(name, *options_of(name, trained), "--batch", "5") == 3
    assert "begun with batch = 4, not 5" in error_line(capsys)


def test_stage_2_trains_on_aligned_latents(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a share of 0 would draw other numbers for the rest; a rate of 0 differs in the alignment alone
    unets = []
    for rate in (0.0, MAX_ETA0):
        monkeypatch.setattr("hcma_fast.train.tiny.unet.MAX_ETA0", rate)
        out = tmp_path / str(rate)
        out.mkdir()
        for path in trained.iterdir():
            if path.name not in ("denoiser-state", "unet"):
                (out / path.name).symlink_to(path)
        assert start("denoiser", *options_of("denoiser", out), "--aligned-share", 1) == 0
        unets.append(load_file(out / "unet" / "diffusion_pytorch_model.safetensors"))
    assert any(not torch.equal(value, unets[1][name]) for name, value in unets[0].items())


def test_a_loss_that_is_not_finite_leaves_its_batch(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in trained.iterdir():
        if not path.name.endswith("-state"):
            (tmp_path / path.name).symlink_to(path)
    plain = torch.Tensor.square
    monkeypatch.setattr(torch.Tensor, "square", lambda value: plain(value) * float("nan"))
    wanted = {
        "vae": {"images", "noise"},
        "vae_decoder": {"images", "latents"},
        "denoiser": {"z", "noise", "timesteps", "hidden", "boxes", "labels", "mask", "plain"},
    }
    for name, tensors in wanted.items():
        assert start(name, *options_of(name, tmp_path)) == 1
        path = tmp_path / f"{name.replace('_', '-')}-state" / "bad-batch-0.safetensors"
        assert load_file(path).keys() == tensors
        line = error_line(capsys)
        assert line.startswith("error: the loss of step 0 is not finite") and str(path) in line


@pytest.mark.parametrize(
    ("name", "options", "code", "words"),
    [
        ("vae_decoder", (), 3, ("no vae yet", "hcma-fast train vae first")),
        ("denoiser", (), 3, ("no tokenizer yet", "hcma-fast train text first")),
        ("pack", ("--run", "nowhere"), 3, ("cannot read this entry of the checkpoint", "nowhere")),
        ("pack", ("--eta0", "nan"), 2, ("eta0",)),
        ("vae", ("--batch", "9", "--scenes", "8"), 2, ("more scenes than the 8", "9")),
        ("vae_decoder", ("--batch", "9", "--scenes", "8"), 2, ("more scenes than the 8", "9")),
        ("text", ("--out", "file/below"), 3, ("Not a directory", "file/below")),
        ("vae", ("--out", "file/below"), 3, ("Not a directory", "file/below")),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: tuple[str, ...],
    code: int,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    out = () if "--out" in options else ("--out", "run")
    assert start(name, *out, *options) == code
    line = error_line(capsys)
    assert line.startswith("error: ") and all(word in line for word in words)


def test_a_command_prints_its_part_alone_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("text", *options_of("text", tmp_path)) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'text_encoder'}\n"
    records = [json.loads(line) for line in said.err.splitlines() if line.startswith("{")]
    (line,) = (tmp_path / "text-state" / "log.jsonl").read_text().splitlines()
    assert records == [json.loads(line)] and "Begins at step 0 of 2." in said.err
    # transformers' bar is drawn where it likes
    assert "shards" not in said.err


@pytest.mark.parametrize(
    "options",
    [
        ("text", "--steps", "0"),
        ("vae", "--batch", "0"),
        ("vae", "--lr", "-1"),
        ("text", "--lr", "1"),
    ],
)
def test_options_that_cannot_be_are_usage_errors(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and options[1] in said.err and not (tmp_path / "run").exists()


# in this process: test_errors_are_one_line_and_an_exit_code; that it parses: test_train_docs.py
@pytest.mark.slow
def test_as_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hcma_fast.train.tiny.pack", "--run", "nowhere", "--out", "x"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot read this entry of the checkpoint")
