"""generate: files, sidecars, reports, and bad input that leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hcma_fast.cli.generate import render

BOXES = ("--box", "dog:0.05,0.3,0.45,0.9", "--box", "pizza:0.5,0.5,0.95,0.9")


@pytest.fixture
def generate(cli: Any, random_checkpoint: Path) -> Any:
    """``generate("--prompt", "x")`` with the small random model in eager, 2 steps."""

    def run(*argv: object) -> Any:
        return cli(
            *("generate", "--model", random_checkpoint, "--backend", "eager", "--steps", 2),
            *("--out", "out", *argv),
        )

    return run


def _files(folder: str = "out") -> list[str]:
    return sorted(os.listdir(folder))


def test_image_sidecar_and_overlay(generate: Any, random_checkpoint: Path) -> None:
    result = generate("--prompt", "a dog", *BOXES, "--seed", 3, "--overlay", "--eta0", 0.25)
    assert result.code == 0, result.err
    assert result.out == "out/a-dog-3.png\n"
    assert _files() == ["a-dog-3-overlay.png", "a-dog-3.json", "a-dog-3.png"]
    assert Image.open("out/a-dog-3.png").size == (16, 16)
    assert Image.open("out/a-dog-3-overlay.png").size == (512, 512)
    sidecar = json.loads(Path("out/a-dog-3.json").read_text())
    image = Path("out/a-dog-3.png").read_bytes()
    assert sidecar["image_sha256"] == hashlib.sha256(image).hexdigest()
    assert (sidecar["prompt"], sidecar["seed"], sidecar["num_inference_steps"]) == ("a dog", 3, 2)
    assert sidecar["layout"]["phrases"] == ["dog", "pizza"]
    assert sidecar["layout"]["boxes"][0] == [0.05, 0.3, 0.45, 0.9]
    assert sidecar["model"] == str(random_checkpoint.resolve())
    assert (sidecar["preset"], sidecar["backend"]) == ("random", "eager")
    # given here, of the checkpoint, and the package's own
    settings = sidecar["settings"]
    assert (settings["eta0"], settings["guidance_scale"]) == (0.25, 7.5)
    assert len(sidecar["weights_hash"]) == 64 and sidecar["engine_hash"] is None
    assert {"hcma-fast", "torch"} <= set(sidecar["versions"])
    assert len(sidecar["losses"]["loss_local"]) == 2


def test_the_image_is_the_pipelines(generate: Any, random_checkpoint: Path) -> None:
    from hcma_fast import HCMAPipeline, Layout

    settings = {"guidance_scale": 3.0, "eta0": 0.5, "lambda_global": 0.25, "lambda_local": 2.0}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    result = generate(
        *("--prompt", "a dog", "--box", "dog:0,0,0.5,1", "--seed", 1, *options),
        *("--negative-prompt", "cat", "--grounding-beta", 0.5, "--align-window", 0.25, 1),
    )
    assert result.code == 0, result.err
    expected = HCMAPipeline.from_pretrained(random_checkpoint)(
        "a dog",
        Layout(["dog"], [(0, 0, 0.5, 1)]),
        num_inference_steps=2,
        seed=1,
        negative_prompt="cat",
        grounding_beta=0.5,
        align_window=(0.25, 1.0),
        **settings,
    ).images[0]
    assert np.array_equal(np.asarray(Image.open("out/a-dog-1.png")), np.asarray(expected))


def test_json_report_is_alone_on_stdout(generate: Any) -> None:
    result = generate("--prompt", "a dog", "--num-images", 2, "--seed", 7, "--json")
    report = json.loads(result.out)
    assert [entry["image"] for entry in report["images"]] == ["out/a-dog-7.png", "out/a-dog-8.png"]
    for entry in report["images"]:
        assert entry["record"] == json.loads(Path(entry["sidecar"]).read_text())
        assert entry["overlay"] is None


def test_input_lines_in_batches(generate: Any) -> None:
    lines = [
        {"prompt": "a dog", "phrases": ["dog"], "boxes": [[0, 0, 0.5, 1]], "id": "first"},
        {"prompt": "a cat", "seed": 40, "negative_prompt": "dog"},
        {"prompt": "a pizza"},
    ]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = generate(
        *("--input", "in.jsonl", "--seed", 5, "--num-images", 2, "--batch-size", 4),
        *("--negative-prompt", "blur"),
    )
    assert result.code == 0, result.err
    names = ["first-5", "first-6", "a-cat-40", "a-cat-41", "a-pizza-5", "a-pizza-6"]
    assert result.out.split() == [f"out/{name}.png" for name in names]
    records = [json.loads(Path(f"out/{name}.json").read_text()) for name in names]
    assert [record["batch_size"] for record in records] == [4, 4, 4, 4, 2, 2]
    assert [record["negative_prompt"] for record in records[1:4]] == ["blur", "dog", "dog"]
    images = {Path(f"out/{name}.png").read_bytes() for name in names}
    assert len(images) == len(names)


def test_layout_file_equals_boxes(generate: Any) -> None:
    layout = {"phrases": ["dog"], "boxes": [[0.05, 0.3, 0.45, 0.9]]}
    Path("layout.json").write_text(json.dumps(layout))
    generate("--prompt", "a", "--layout", "layout.json", "--seed", 0, "--out", "one")
    generate("--prompt", "a", *BOXES[:2], "--seed", 0, "--out", "two")
    assert Path("one/a-0.png").read_bytes() == Path("two/a-0.png").read_bytes()


def test_a_sidecar_makes_the_identical_image(generate: Any, cli: Any) -> None:
    generate(
        *("--prompt", "a dog", *BOXES, "--seed", 3, "--guidance-scale", 4, "--eta0", 0.3),
        *("--negative-prompt", "cat", "--align-window", 0, 0.5, "--lambda-local", 0.5),
    )
    again = cli("generate", "--from-sidecar", "out/a-dog-3.json", "--out", "again", "--overlay")
    assert again.code == 0, again.err
    assert "note" not in again.err
    for name in ("a-dog-3.png", "a-dog-3.json"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    assert Path("again/a-dog-3-overlay.png").exists()


def test_a_sidecar_without_out_writes_here_as_any_other_and_not_beside_itself(
    generate: Any, cli: Any
) -> None:
    generate("--prompt", "a", "--seed", 3)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    again = cli("generate", "--from-sidecar", "out/a-3.json")
    assert (again.code, again.out) == (0, "a-3.png\n"), again.err
    assert Path("a-3.png").read_bytes() == Path("out/a-3.png").read_bytes()
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    # where the first image is, it stays
    again = cli("generate", "--from-sidecar", "a-3.json")
    again.failed(3, "a-3.png", "Use --force to replace it, or another --out.")
    assert "--seed" not in again.err


def test_a_sidecar_repeats_the_savings(generate: Any, cli: Any) -> None:
    plain = generate("--prompt", "a dog", "--box", "dog:0.1,0.1,0.9,0.9", "--seed", 3, "--json")
    found = generate(
        *("--prompt", "a dog", "--box", "dog:0.1,0.1,0.9,0.9", "--seed", 3, "--out", "saved"),
        *("--saving", "guidance_end=0.5", "--saving", "align_every=2", "--json"),
    )
    record, exact = (json.loads(r.out)["images"][0]["record"] for r in (found, plain))
    assert record["savings"]["guidance_end"] == 0.5 and record["savings"]["align_every"] == 2
    assert record["image_sha256"] != exact["image_sha256"]
    again = cli("generate", "--from-sidecar", "saved/a-dog-3.json", "--out", "again")
    assert again.code == 0 and "note" not in again.err, again.err
    assert Path("again/a-dog-3.png").read_bytes() == Path("saved/a-dog-3.png").read_bytes()


def test_a_sidecar_whose_image_differs_says_so(generate: Any, cli: Any) -> None:
    generate("--prompt", "a", "--seed", 3)
    path = Path("out/a-3.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_sha256": "0" * 64}))
    again = cli("generate", "--from-sidecar", path, "--out", "again")
    assert again.code == 0 and "differs from the sidecar's image_sha256" in again.err


def test_a_sidecar_refuses_other_weights(
    generate: Any, cli: Any, random_checkpoint: Path, tmp_path: Path
) -> None:
    generate("--prompt", "a", "--seed", 3)
    other = tmp_path / "other"
    shutil.copytree(random_checkpoint, other)
    info = json.loads((other / "hcma.json").read_text())
    (other / "hcma.json").write_text(json.dumps({**info, "preset": "changed"}))
    again = cli("generate", "--from-sidecar", "out/a-3.json", "--model", other, "--out", "again")
    again.failed(3, "hash differs", json.loads(Path("out/a-3.json").read_text())["weights_hash"])
    assert not Path("again").exists()


@pytest.mark.parametrize(
    "option",
    [
        "--seed=1",
        "--steps=3",
        "--eta0=0",
        "--box=dog:0,0,1,1",
        "--num-images=1",
        "--lambda-local=1",
        "--saving=align_every=2",
    ],
)
def test_a_sidecar_fixes_the_settings(cli: Any, generate: Any, option: str) -> None:
    generate("--prompt", "a", "--seed", 3)
    result = cli("generate", "--from-sidecar", "out/a-3.json", "--out", "again", option)
    result.failed(2, "fixes this already", option.partition("=")[0])
    assert not Path("again").exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "not a sidecar"),
        ("{}", "image"),
        (None, "No such file"),
        ({"image": "../-x.png"}, "file name"),
        ({"seed": -1}, "seed"),
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"backend": "magic"}, "magic"),
        ({"layout": {"phrases": ["a"], "boxes": [[0, 0, 2, 1]]}}, "image"),
        ({"settings": {"eta0": -1}}, "eta0"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_sidecar(cli: Any, generate: Any, content: Any, word: str) -> None:
    path = Path("s.json")
    if isinstance(content, dict):
        generate("--prompt", "a", "--seed", 3, "--out", "first")
        good = json.loads(Path("first/a-3.json").read_text())
        path.write_text(json.dumps({**good, **content}))
    elif content is not None:
        path.write_text(content)
    result = cli("generate", "--from-sidecar", path, "--out", "again")
    result.failed(2 if word == "magic" else 3, word)
    assert not Path("again").exists()


def test_force_replaces_and_leaves_no_stale_overlay(generate: Any) -> None:
    generate("--prompt", "a", "--seed", 1, "--overlay")
    before = Path("out/a-1.json").read_text()
    generate("--prompt", "a", "--seed", 1).failed(3, "exists already", "out/a-1.png", "--force")
    assert Path("out/a-1.json").read_text() == before
    result = generate("--prompt", "a", "--seed", 1, "--force", "--eta0", 0)
    assert result.code == 0
    assert _files() == ["a-1.json", "a-1.png"]
    assert json.loads(Path("out/a-1.json").read_text())["losses"] is None


BAD = {
    "no source": (2, [], "exactly one"),
    "two sources": (2, ["--prompt", "a", "--input", "x.jsonl"], "exactly one"),
    "box and layout": (2, ["--prompt", "a", *BOXES, "--layout", "x.json"], "--box and --layout"),
    "input and box": (2, ["--input", "x.jsonl", *BOXES], "bring their own boxes"),
    "window": (2, ["--prompt", "a", "--align-window", "0.5", "0.25"], "window"),
    "infinite": (2, ["--prompt", "a", "--guidance-scale", "inf"], "guidance_scale"),
    "saving": (
        2,
        ["--prompt", "a", "--saving", "guidance_end=2"],
        "guidance_end cannot have this value",
    ),
    "box syntax": (3, ["--prompt", "a", "--box", "dog"], "PHRASE:X0,Y0,X1,Y1"),
    "box outside": (3, ["--prompt", "a", "--box", "dog:0,0,1.5,1"], "1.5"),
    "box inverted": (3, ["--prompt", "a", "--box", "dog:0.5,0,0.1,1"], "inverted"),
    "31 boxes": (3, ["--prompt", "a", *["--box", "dog:0,0,1,1"] * 31], "30"),
    "missing layout": (3, ["--prompt", "a", "--layout", "none.json"], "none.json"),
    "missing input": (3, ["--input", "none.jsonl"], "none.jsonl"),
    "missing model": (3, ["--prompt", "a", "--model", "./none"], "./none"),
    "unknown preset": (3, ["--prompt", "a", "--model", "tiniest"], "tiniest"),
    "empty model": (3, ["--prompt", "a", "--model", "."], "lacks"),
    "long prompt": (3, ["--prompt", "x" * 90], "tokens"),
    "long negative": (3, ["--prompt", "a", "--negative-prompt", "x" * 90], "negative prompt"),
    "long phrase": (3, ["--prompt", "a", "--box", "x" * 90 + ":0,0,1,1"], "phrase"),
    "seed and count": (3, ["--prompt", "a", "--seed", 2**64 - 1, "--num-images", 2], "seed"),
    "not unicode": (3, ["--prompt", "a\udcff"], "Unicode"),
    "negative not unicode": (3, ["--prompt", "a", "--negative-prompt", "\udcff"], "Unicode"),
    "phrase not unicode": (3, ["--prompt", "a", "--box", "\udcff:0,0,1,1"], "\\udcff"),
    "out is a file": (3, ["--prompt", "a", "--out", "file"], "file"),
    "out below a file": (3, ["--prompt", "a", "--out", "file/below"], "file/below"),
    "out in proc": (3, ["--prompt", "a", "--out", "/proc/nowhere"], "/proc/nowhere"),
    "unknown backend": (2, ["--prompt", "a", "--backend", "magic"], "magic"),
    "no cuda": (4, ["--prompt", "a", "--device", "cuda"], "CUDA"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(generate: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, argv, word = BAD[name]
    Path("file").write_text("")
    generate("--seed", 0, *argv).failed(code, word)
    assert _files(".") == ["file"]


def test_a_bad_line_stops_before_anything_is_loaded(
    generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("hcma_fast.cli.generate.command.open_pipeline", load)
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "boxes": [[0, 0, 1, 1]]}\n')
    generate("--input", "in.jsonl").failed(3, "line 2: ")
    # a good file does get there
    Path("in.jsonl").write_text('{"prompt": "a"}\n')
    generate("--input", "in.jsonl").failed(1, "loaded")


def test_a_long_text_in_a_late_line_stops_before_the_first_image(generate: Any) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "phrases": ["x" * 90], "boxes": [[0, 0, 1, 1]]}]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    generate("--input", "in.jsonl", "--batch-size", 1).failed(3, "line 2: ", "tokens")
    assert not Path("out").exists()


@pytest.mark.parametrize("damage", ["cut", "garbage", "pickle"])
def test_damaged_weights(
    generate: Any, random_checkpoint: Path, tmp_path: Path, damage: str
) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(random_checkpoint, model)
    (weights,) = (model / "unet").glob("*.safetensors")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    else:
        weights.unlink()
        weights.with_suffix(".bin").write_bytes(b"\x80\x04junk")
    generate("--prompt", "a", "--model", model).failed(3, str(model))
    assert not Path("out").exists()


def test_a_full_disk_in_the_middle_keeps_whole_images(
    generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write_file = render.write_file

    def fail_at_the_third(path: Path, content: bytes) -> None:
        if len(written) == 3:
            monkeypatch.setattr(os, "fsync", _no_space)
        written.append(path)
        write_file(path, content)

    monkeypatch.setattr(render, "write_file", fail_at_the_third)
    result = generate("--prompt", "a", "--seed", 0, "--num-images", 3, "--batch-size", 1)
    result.failed(3, "No space left", "a-1.json")
    # the second image has come to the disk, but no sidecar speaks of it
    assert _files() == ["a-0.json", "a-0.png", "a-1.png"]


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--backend", "openvino"), 2, "CUDA graphs need an NVIDIA GPU"),
        (("--backend", "torch-compile", "--device", "cpu"), 2, "CUDA graphs need an NVIDIA GPU"),
        (("--backend", "onnxruntime", "--device", "cuda"), 4, "cannot be captured"),
    ],
)
def test_cuda_graphs_are_refused_before_engines_are_built(
    cli: Any, options: tuple[str, ...], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hcma_fast.export.cache.engine_folder", lambda *_, **__: pytest.fail("it builds")
    )
    result = cli("generate", "--prompt", "a", "--cuda-graphs", *options, "--out", "out")
    result.failed(code, words)
    assert not Path("out").exists()


def test_cuda_graphs_of_an_engine_folder_are_up_to_its_device(cli: Any, tmp_path: Path) -> None:
    """torch-compile's may be for a GPU, which only the manifest says."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "manifest.json").write_text("{}")
    given = ("--model", tmp_path / "engine", "--backend", "torch-compile", "--cuda-graphs")
    result = cli("generate", "--prompt", "a", *given, "--out", "out")
    assert result.code == 6 and "NVIDIA" not in result.err, result.err
