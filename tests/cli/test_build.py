"""build, and generate on what it built."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from PIL import Image

from hcma_fast.export.estimate import estimate
from hcma_fast.export.target import Target
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.models.checkpoint.random_sd14 import RandomSD14
from hcma_fast.specs import GRAPH_NAMES

OPTIONS = ("--prompt", "a dog", "--box", "dog:0,0,0.5,1", "--steps", 2, "--seed", 0)


@pytest.fixture
def build(cli: Any, random_checkpoint: Path) -> Any:
    return lambda *argv: cli("build", "--model", random_checkpoint, *argv)


def test_dry_run_shows_graphs_and_folder_and_writes_nothing(build: Any, tmp_path: Path) -> None:
    result = build("--dry-run", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["folder"].startswith(str(tmp_path / "cache" / "onnxruntime-"))
    assert list(report["graphs"]) == list(GRAPH_NAMES)
    assert report["graphs"]["align"]["inputs"]["z"] == {
        "shape": ["batch", 4, 8, 8],
        "dtype": "float32",
    }
    assert not (tmp_path / "cache").exists()
    result = build("--dry-run", "--out", "engine")
    assert result.out == "engine\n"
    assert "Would build onnxruntime, float32, any batch, 16 x 16 pixels:\n" in result.err
    for word in ("unet_grounded", "encoder_hidden_states", "(batch, 77, 16)", "float32"):
        assert word in result.err
    assert os.listdir() == []


def test_step_graphs_for_a_window_are_said_to_be_idle(cli: Any, build: Any) -> None:
    note = "Step graphs align at every step"
    assert note in cli("build", "--model", "tiny", "--fuse", "step", "--dry-run").err
    assert note not in cli("build", "--model", "tiny", "--dry-run").err
    assert note not in build("--fuse", "step", "--dry-run").err


@pytest.mark.parametrize(
    ("code", "argv", "word"),
    [
        (2, ["--backend", "magic"], "magic"),
        (4, ["--precision", "bfloat16"], "float16"),
        (4, ["--precision", "int4"], "int4"),
        (2, ["--batch", "8:4:16"], "1:8:16"),
        (2, ["--gpu-arch", "sm89"], "TensorRT"),
        (2, ["--strip-weights"], "TensorRT"),
        (2, ["--fuse", "everything"], "everything"),
        (2, ["--device", "toaster"], "toaster"),
        (2, ["--backend", "torch-compile", "--device", "meta"], "cpu or cuda"),
        (2, ["--backend", "onnxruntime", "--device", "cuda"], "torch-compile alone"),
        (3, ["--height", "17"], "multiples of 4"),
        (2, ["--random-weights"], "sd14"),
        (2, ["--backend", "eager"], "nothing to build"),
        (3, ["--model", "tiniest"], "tiniest"),
        (3, ["--out", "file"], "file"),
        (3, ["--out", "file/below"], "file/below"),
        (3, ["--out", "other"], "not an engine folder"),
        (3, ["--out", "other", "--force"], "not an engine folder"),
    ],
)
def test_bad_input(build: Any, code: int, argv: list[str], word: str) -> None:
    Path("file").write_text("")
    Path("other").mkdir()
    Path("other/mine.txt").write_text("")
    build(*argv).failed(code, word)
    assert sorted(os.listdir()) == ["file", "other"]
    assert os.listdir("other") == ["mine.txt"]


@pytest.mark.parametrize("extra", [(), ("--dry-run",), ("--out", "engine")])
def test_no_gpu_is_said_before_any_work(
    build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        "hcma_fast.models.checkpoint.folder.load_components", lambda *_, **__: pytest.fail("loaded")
    )
    build("--backend", "torch-compile", "--device", "cuda", *extra).failed(
        4, "torch finds no CUDA device", "hcma-fast doctor"
    )
    assert os.listdir() == [] and not (tmp_path / "cache").exists()


def test_a_plan_for_a_gpu_names_it(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    for_gpu = ("--backend", "torch-compile", "--device", "cuda", "--precision", "fp16")
    result = build(*for_gpu, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["key_parts"]["machine"].endswith(" sm_89")
    assert "sm_89" in result.err
    on_cpu = build("--backend", "torch-compile", "--dry-run", "--json")
    assert "sm_" not in json.loads(on_cpu.out)["key_parts"]["machine"]
    build("--device", "cuda", "--dry-run").failed(2, "torch-compile alone")
    build(*for_gpu[:2], "--device", "cuda:0", "--dry-run").failed(2, "cpu or cuda")


@pytest.mark.slow
def test_build_prints_the_folder_and_a_table(build: Any) -> None:
    result = build("--out", "engine", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["folder"] == "engine"
    assert list(report["graphs"]) == list(GRAPH_NAMES)
    assert all(0 <= g["parity"] <= g["tolerance"] for g in report["graphs"].values())
    for graph in GRAPH_NAMES:
        assert f"{graph}: validate" in result.err
    assert Path("engine/manifest.json").exists()
    assert os.listdir() == ["engine"]


@pytest.fixture
def cached(cli: Any, random_engine: Path) -> Path:
    """``random_engine``, put where the command looks for it in the user's cache."""
    from hcma_fast.export.cache import cached_folder
    from hcma_fast.export.manifest import load_manifest

    folder = cached_folder(load_manifest(random_engine).weights_hash, Target("onnxruntime"))
    shutil.copytree(random_engine, folder)
    return folder


def test_what_is_in_the_cache_is_not_built_again(
    build: Any, cli: Any, cached: Path, random_checkpoint: Path
) -> None:
    for _ in range(2):
        result = build()
        assert (result.code, result.out) == (0, f"{cached}\n"), result.err
        assert "in the cache already" in result.err and "unet_plain" in result.err
    report = json.loads(build("--json").out)
    generated = cli("generate", "--model", random_checkpoint, *OPTIONS, "--json")
    assert generated.code == 0, generated.err
    assert "Building" not in generated.err
    record = json.loads(generated.out)["images"][0]["record"]
    assert (record["backend"], record["engine_hash"]) == ("onnxruntime", report["engine_hash"])
    assert record["weights_hash"] == report["weights_hash"]
    assert "onnxruntime" in record["versions"]


def test_an_engine_folder_is_a_model_and_a_sidecar_works_on_it(
    cli: Any, random_engine: Path
) -> None:
    first = cli("generate", "--model", random_engine, *OPTIONS, "--out", "one")
    assert first.code == 0, first.err
    second = cli("generate", "--from-sidecar", "one/a-dog-0.json", "--out", "two")
    assert second.code == 0, second.err
    assert Path("one/a-dog-0.png").read_bytes() == Path("two/a-dog-0.png").read_bytes()
    other = cli("generate", *OPTIONS, "--model", random_engine, "--backend", "eager")
    other.failed(4, "onnxruntime")


def test_an_eager_sidecar_can_be_made_again_on_the_engine(
    cli: Any, random_engine: Path, random_checkpoint: Path
) -> None:
    eager = ("--model", random_checkpoint, "--backend", "eager")
    assert cli("generate", *eager, *OPTIONS, "--out", "one").code == 0
    again = cli(
        "generate", "--from-sidecar", "one/a-dog-0.json", "--model", random_engine, "--out", "two"
    )
    assert again.code == 0, again.err
    record = json.loads(Path("two/a-dog-0.json").read_text())
    assert record["backend"] == "onnxruntime"
    one, two = (np.asarray(Image.open(f"{x}/a-dog-0.png")).astype(int) for x in ("one", "two"))
    assert np.abs(one - two).max() <= 1


def test_a_damaged_engine_is_never_opened(build: Any, cli: Any, random_engine: Path) -> None:
    engine = Path("engine")
    shutil.copytree(random_engine, engine)
    build("--out", engine).failed(3, "--force")
    graph = engine / "vae_decoder.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    cli("generate", *OPTIONS, "--model", engine, "--out", "three").failed(6, graph.name)
    (engine / "manifest.json").write_text("{")
    cli("generate", *OPTIONS, "--model", engine, "--out", "three").failed(6, "manifest")
    assert not Path("three").exists()


def test_force_deletes_nothing_but_engines(build: Any, random_engine: Path) -> None:
    Path("site").mkdir()
    Path("site/manifest.json").write_text('{"name": "my web app"}')
    Path("site/thesis.tex").write_text("years of work")
    build("--out", "site", "--force").failed(3, "not an engine folder", "thesis.tex", "--out")
    shutil.copytree(random_engine, "engine")
    Path("engine/thesis.tex").write_text("years of work")
    build("--out", "engine", "--force").failed(3, "not of an engine", "thesis.tex", "--out")
    assert sorted(os.listdir()) == ["engine", "site"]
    assert Path("site/thesis.tex").is_file() and Path("engine/align.onnx").is_file()


def test_keys_are_asked_for_where_they_mean_something(
    build: Any, cli: Any, random_engine: Path
) -> None:
    Path("key.pem").write_text("junk")
    build("--sign-key", "key.pem").failed(2, "--out FOLDER")
    build("--verify-key", "key.pem").failed(2, "--verify FOLDER")
    build("--sign-key", "key.pem", "--out", "engine").failed(3, "not an unencrypted private key")
    build("--verify", random_engine, "--verify-key", "key.pem").failed(3, "not a public key")
    generate = ("generate", *OPTIONS, "--verify-key", "key.pem", "--out", "x", "--model")
    cli(*generate, random_engine).failed(3, "not a public key")
    cli(*generate, "tiny").failed(2, "only engine folders are signed")
    public = Ed25519PrivateKey.generate().public_key()
    Path("key.pem").write_bytes(
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    cli(*generate, random_engine).failed(6, "is not signed", "--sign-key")
    assert os.listdir() == ["key.pem"]


@pytest.mark.slow
def test_a_signed_folder_is_built_verified_and_drawn_with(build: Any, cli: Any) -> None:
    key = Ed25519PrivateKey.generate()
    Path("key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    Path("key.pub").write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    result = build("--backend", "onnxruntime", "--sign-key", "key.pem", "--out", "engine")
    assert result.code == 0, result.err
    assert build("--verify", "engine", "--verify-key", "key.pub").code == 0
    generate = ("generate", *OPTIONS, "--model", "engine", "--verify-key", "key.pub")
    result = cli(*generate, "--out", "x")
    assert result.code == 0, result.err
    manifest = Path("engine/manifest.json")
    manifest.write_text(manifest.read_text().replace('"guidance', '"guidancf', 1))
    assert cli(*generate, "--out", "y").code == 6
    assert not Path("y").exists()


def test_verify_compares_again(build: Any, random_engine: Path) -> None:
    result = build("--verify", random_engine, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert set(report["verified"]) == set(GRAPH_NAMES)
    assert all(0 <= error < 1e-4 for error in report["verified"].values())
    build("--verify", random_engine, "--model", "tiny").failed(6, "other weights")


def test_cache_list_and_prune(cli: Any, cached: Path) -> None:
    broken = cached.parent / ("onnxruntime-" + "a" * 24)
    broken.mkdir()
    listed = json.loads(cli("cache", "list", "--json").out)
    assert {entry["state"] for entry in listed} == {"current", "damaged"}
    assert cli("cache", "list").out.split() == [entry["folder"] for entry in listed]
    assert cli("cache", "prune").out == f"{broken}\n"
    assert cli("cache", "prune", "--all").out == f"{cached}\n"
    assert cli("cache", "list").out == ""


def test_the_cache_is_readable_at_80_columns(
    cli: Any, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("openvino-" + "ab" * 12, ".onnxruntime-" + "cd" * 12 + ".part-gj7mgo6z"):
        (cached.parent / name).mkdir()
    (cached.parent / "kernels" / ("ef" * 12)).mkdir(parents=True)
    *lines, _ = cli("cache", "list").err.splitlines()  # the last one names the cache's folder
    assert max(map(len, lines)) <= 80
    firsts = [line.split()[0] for line in lines if line.strip()]
    keys = {cached.name.rpartition("-")[2][:8], "abababab", "cdcdcdcd", "efefefef"}
    assert keys < set(firsts)
    (line,) = [line for line in lines if line.split()[:1] == [cached.name.rpartition("-")[2][:8]]]
    assert line.split()[1:4] == ["random", "onnxruntime", "float32"]


def test_full_size_dry_run_needs_no_weights(cli: Any) -> None:
    options = ("--backend", "tensorrt-rtx", "--precision", "fp16", "--gpu-arch", "sm89")
    result = cli("build", "--model", "sd14", "--random-weights", *options, "--dry-run", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["estimated_memory_bytes"] < 16e9
    wanted = {"precision": "float16", "batch": "1:1:8", "height": 512, "width": 512}
    assert wanted.items() <= report.items()
    line = "Would build tensorrt-rtx, float16, batch 1:1:8, 512 x 512 pixels, for sm89:\n"
    assert line in result.err
    assert report["graphs"]["unet_grounded"]["inputs"]["text_context"]["shape"][1:] == [77, 24960]
    assert report["key_parts"]["machine"] == "sm89"
    cli("build", "--model", "sd14").failed(3, "--random-weights")


#: docs/build.md, as measured
@pytest.mark.parametrize(
    ("target", "disk_bytes"),
    [
        (Target("tensorrt-rtx", "float16", architectures=("sm89",)), 4.4e9),
        (Target("onnxruntime"), 5.0e9),
        (Target("openvino"), 5.0e9),
    ],
)
def test_the_estimate_of_the_disk_is_near_what_was_measured_at_full_size(
    target: Target, disk_bytes: float
) -> None:
    found = estimate(RandomSD14(), target)
    assert found.disk_bytes == pytest.approx(disk_bytes, rel=0.06)
    # ONNX graphs in float16 lie beside the engines until the end
    onnx = estimate(RandomSD14(), Target("onnxruntime", target.precision)).disk_bytes
    assert found.peak_disk_bytes == found.disk_bytes + (onnx if target.native else 0)


def test_the_estimate_of_the_disk_is_near_that_of_tiny() -> None:
    found = estimate(load_components("tiny"), Target("onnxruntime"))
    # its weights.bin
    assert found.disk_bytes == pytest.approx(30_178_816, rel=0.05)


def test_stripped_engines_need_their_onnx_graphs_and_compiled_code_has_none() -> None:
    def of(backend: str, **options: Any) -> tuple[int, int]:
        found = estimate(RandomSD14(), Target(backend, "float16", **options))
        return found.disk_bytes, found.peak_disk_bytes

    assert of("tensorrt-rtx", strip_weights=True) == of("onnxruntime")
    disk, peak = of("torch-compile")
    assert (disk, peak) == (of("tensorrt-rtx")[0], disk)


def test_a_build_needs_the_disk_of_its_peak(
    build: Any, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    target = Target("tensorrt-rtx", architectures=("sm89",))
    needs = estimate(load_components(random_checkpoint), target)
    free = (needs.disk_bytes + needs.peak_disk_bytes) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    options = ("--backend", "tensorrt-rtx", "--gpu-arch", "sm89")
    build(*options, "--out", "engine").failed(3, "GiB of disk", "hcma-fast cache prune")
    assert os.listdir() == []


def test_a_missing_backend_is_exit_4_with_what_brings_it(
    cli: Any, random_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    cli("generate", *OPTIONS, "--model", random_engine).failed(4, "hcma-fast[")
    assert os.listdir() == []
