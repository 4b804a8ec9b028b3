"""An engine folder that is not exactly what was built is never used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hcma_fast import HCMAPipeline
from hcma_fast.errors import BackendError, EngineError
from hcma_fast.export.backends.aoti.build import target as here
from hcma_fast.export.manifest import MANIFEST_FILE, Manifest, check_usable, load_manifest
from hcma_fast.export.open import open_engines
from hcma_fast.export.target import Target
from hcma_fast.specs import BATCH, PLAN_COLUMNS, PLAN_ROWS, TensorSpec


@pytest.fixture
def engine(random_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_engine, tmp_path / "engine"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", ["unet_grounded.onnx", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_files_are_found_before_anything_is_read(
    engine: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a graph was read before the hashes were checked")

    monkeypatch.setattr("hcma_fast.export.backends.onnxruntime.engine.open_session", fail)
    content = bytearray((engine / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        (engine / name).write_bytes(content)
    elif damage == "truncate":
        (engine / name).write_bytes(content[:-1])
    else:
        (engine / name).unlink()
    with pytest.raises(EngineError, match=r"hcma-fast build") as caught:
        HCMAPipeline.from_pretrained(engine)
    assert name in str(caught.value) and caught.value.exit_code == 6


@pytest.mark.parametrize(
    "values",
    [
        {"surprise": 1},
        {"format": 1},
        {"graphs": {}},
        {"graphs": None},
        {"target": {"backend": "caffe"}},
        {"target": {"backend": "onnxruntime", "precision": "int4"}},
        {"target": {"backend": "tensorrt", "precision": "float16"}},
        {"files": {}},
        {"files": {"../outside": "0" * 64}},
        {"files": {"/etc/hostname": "0" * 64}},
    ],
)
def test_a_changed_manifest_is_refused(engine: Path, values: dict[str, Any]) -> None:
    edit(engine, **values)
    with pytest.raises(EngineError):
        load_manifest(engine)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_broken_manifest_is_refused(engine: Path, content: str) -> None:
    (engine / MANIFEST_FILE).write_text(content)
    with pytest.raises(EngineError, match="manifest"):
        load_manifest(engine)


def test_a_missing_field_is_refused(engine: Path) -> None:
    path = engine / MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["weights_hash"]
    path.write_text(json.dumps(content))
    with pytest.raises(EngineError, match="weights_hash"):
        load_manifest(engine)


def test_links_are_refused(engine: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (engine / "align.onnx").rename(outside)
    (engine / "align.onnx").symlink_to(outside)
    with pytest.raises(EngineError, match="link"):
        load_manifest(engine)
    (engine / "align.onnx").unlink()
    outside.rename(engine / "align.onnx")
    load_manifest(engine)
    (engine / "tokenizer").rename(tmp_path / "tokenizer")
    (engine / "tokenizer").symlink_to(tmp_path / "tokenizer")
    with pytest.raises(EngineError, match="link"):
        load_manifest(engine)


@pytest.mark.parametrize("name", ["extra.onnx", "tokenizer/added_tokens.json"])
def test_a_file_that_the_manifest_does_not_name_is_refused(engine: Path, name: str) -> None:
    (engine / name).write_text("{}")
    with pytest.raises(EngineError, match="does not name") as caught:
        load_manifest(engine)
    assert name in str(caught.value)


def compiled(engine: Path, device: Any) -> Manifest:
    """As if the folder had been compiled for ``device`` on this machine."""
    manifest = load_manifest(engine)
    target = Target("torch-compile", device=device)
    return manifest.model_copy(
        update={
            "target": target,
            "backend_version": str(torch.__version__),
            "key_parts": {**manifest.key_parts, "machine": here(device)},
        }
    )


def test_code_for_a_gpu_says_so_and_is_refused_elsewhere(
    random_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
        manifest = compiled(random_engine, "cuda")
        check_usable(manifest)
        gpu.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        with pytest.raises(EngineError, match=r"built for .*sm_89") as caught:
            check_usable(manifest)
        assert "sm_90" in str(caught.value) and caught.value.exit_code == 6
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"built for .*sm_89[\s\S]*no GPU"):
            check_usable(manifest)
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again == manifest and again.device == "cuda"


@pytest.mark.parametrize(("built", "asked"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_code_of_the_other_device_is_refused(random_engine: Path, built: str, asked: str) -> None:
    with pytest.raises(BackendError, match=f"compiled for the device {built}") as caught:
        open_engines(random_engine, compiled(random_engine, built), asked)
    assert f"--device {asked}" in str(caught.value)


def test_step_graphs_of_an_older_version_are_refused(random_engine: Path) -> None:
    manifest = load_manifest(random_engine)
    check_usable(manifest)
    record = manifest.graphs["align"]
    for shape, right in (((1000, 10), False), ((BATCH, PLAN_ROWS, PLAN_COLUMNS), True)):
        spec = replace(record.spec, inputs=(TensorSpec("plan", shape),))
        graphs = {**manifest.graphs, "step_plain": record.model_copy(update={"spec": spec})}
        changed = manifest.model_copy(update={"graphs": graphs})
        if right:
            check_usable(changed)
        else:
            with pytest.raises(EngineError, match="older version"):
                check_usable(changed)
