"""`generate` with a single file and what is laid over it, and its sidecar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hcma_fast.cli.app import main


def test_generate_and_its_sidecar(
    formats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    key = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{key}.lora_down.weight": torch.rand(2, 64, 1, 1)}
    save_file(lora | {f"{key}.lora_up.weight": torch.rand(64, 2, 1, 1)}, tmp_path / "lora")
    base = ["generate", "--backend", "eager", "--steps", "2", "--prompt", "a dog", "--seed", "1"]
    parts = {
        "--model": formats / "plain.safetensors",
        "--aligner": formats / "aligner",
        "--gligen": formats / "adapter.safetensors",
        "--vae": formats / "vae.safetensors",
    }
    given = [word for name, path in parts.items() for word in (name, str(path))]
    more = [
        "--lora",
        f"{tmp_path / 'lora'}:0.5",
        "--clip-skip",
        "2",
        "--box",
        "dog:0.1,0.2,0.6,0.9",
    ]
    assert main([*base, *given, *more, "--out", str(tmp_path / "one")]) == 0
    (sidecar,) = (tmp_path / "one").glob("*.json")
    record = json.loads(sidecar.read_text())
    for name, path in parts.items():
        assert record[name.removeprefix("--")] == str(path)
    assert (record["clip_skip"], record["loras"]) == (2, [f"{tmp_path / 'lora'}:0.5"])
    assert main(["generate", "--from-sidecar", str(sidecar), "--out", str(tmp_path / "two")]) == 0
    (one,), (two,) = ((tmp_path / name).glob("*.png") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    # of an adapter that has changed since
    capsys.readouterr()
    changed = ["--lora", f"{tmp_path / 'lora'}:0.6", "--out", str(tmp_path / "three")]
    assert main(["generate", "--from-sidecar", str(sidecar), *changed]) == 3
    assert "hash differs" in capsys.readouterr().err
    for wrong, message in (
        (["--gligen", str(tmp_path / "absent")], "no such file"),
        (["--lora", f"{tmp_path / 'lora'}:nan"], "finite number"),
        (["--clip-skip", "0"], "clip_skip must be"),
        (["--model", str(formats / "adapter.safetensors")], "--gligen"),
    ):
        assert main([*base, *wrong, "--out", str(tmp_path / "four")]) == 3
        assert message in capsys.readouterr().err
