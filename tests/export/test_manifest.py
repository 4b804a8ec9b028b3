"""An engine folder that is not exactly what was built is never used."""

from __future__ import annotations

import copy
import functools
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_edits import edit

from hcma_fast import HCMAPipeline
from hcma_fast.errors import BackendError, EngineError
from hcma_fast.export.backends.aoti.build import target as here
from hcma_fast.export.manifest import (
    MANIFEST_FILE,
    Manifest,
    VerifiedFolder,
    canonical_hash,
    check_usable,
    load_manifest,
    read_manifest,
)
from hcma_fast.export.open import open_engines
from hcma_fast.export.target import Target
from hcma_fast.specs import BATCH, PLAN_COLUMNS, PLAN_ROWS, TensorSpec


@pytest.fixture
def engine(random_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_engine, tmp_path / "engine"))


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
    edit(engine, lambda found: found.update(values), reseal=False)
    with pytest.raises(EngineError):
        load_manifest(engine)


def test_a_broken_manifest_is_refused(engine: Path) -> None:
    path = engine / MANIFEST_FILE
    whole = path.read_text()
    for content in (
        *("", "{", "[]", "null", "1", '"x"', "[" * 10**5, "{}", whole[:-3], "\xff"),
        whole + " " * 2**24,
        whole.replace('"format"', '"format": 3, "format"', 1),
        whole.replace('"eta0": 0.5', '"eta0": 0.5, "eta0": 0.25', 1),
        *(whole.replace('"eta0": 0.5', f'"eta0": {n}') for n in ("NaN", "Infinity", "1e999")),
    ):
        assert content != whole
        path.write_text(content, encoding="latin-1")
        with pytest.raises(EngineError, match="manifest"):
            load_manifest(engine)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(EngineError, match="this is a pipe"):
        load_manifest(engine)


def _leaves(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from _leaves(value, (*place, key))
        else:
            yield (*place, key)


def _another(value: Any) -> Any:
    if isinstance(value, str):
        return value + "x"
    return not value if isinstance(value, bool) else (value or 0) + 1


def test_a_change_of_any_value_is_found(engine: Path) -> None:
    """Guidance, preset and parity too, which no file's hash covers."""
    path = engine / MANIFEST_FILE
    values = json.loads(path.read_text())
    del values["signature"]
    places = [*_leaves(values)]
    assert ("info", "alignment", "guidance_scale") in places and len(places) > 150
    for place in places:
        changed = copy.deepcopy(values)
        owner = functools.reduce(operator.getitem, place[:-1], changed)
        old = owner[place[-1]]
        owner[place[-1]] = _another(old)
        path.write_text(json.dumps(changed))
        with pytest.raises(EngineError):
            read_manifest(engine)
        del owner[place[-1]]
        path.write_text(json.dumps(changed))
        with pytest.raises(EngineError):
            read_manifest(engine)


def test_the_hash_is_of_the_content_and_not_of_its_form(engine: Path) -> None:
    path = engine / MANIFEST_FILE
    before = load_manifest(engine)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(values.items())), separators=(" ,", " : ")))
    assert load_manifest(engine) == before
    assert before.engine_hash == canonical_hash(before.model_dump(mode="json"))


@pytest.mark.parametrize(("found", "word"), [(1, "an older"), (2, "an older"), (4, "a newer")])
def test_another_format_is_named(engine: Path, found: int, word: str) -> None:
    edit(engine, lambda values: values.update(format=found), reseal=False)
    with pytest.raises(EngineError, match=f"built by {word} version.*[\\s\\S]*Build it again"):
        load_manifest(engine)


def test_specs_are_compared_with_the_graphs(engine: Path, random_engine: Path) -> None:
    """With a hash that fits: whoever edits by a program. They used to end as KeyErrors."""

    def tensor(way: str, number: int = 0) -> Callable[[dict[str, Any]], Any]:
        return lambda values: values["graphs"]["align"]["spec"][way][number]

    for change, word in (
        (lambda v: tensor("inputs")(v).update(name="latent"), "latent is missing"),
        (lambda v: tensor("outputs")(v).update(name="moved"), "moved is missing"),
        (lambda v: tensor("inputs")(v).update(dtype="float16"), "z is float32"),
        (lambda v: tensor("inputs")(v)["shape"].pop(), "z is float32"),
        (lambda v: tensor("inputs")(v)["shape"].__setitem__(1, 5), "z is float32"),
        (lambda v: v["graphs"]["align"]["spec"]["inputs"].reverse(), "order"),
        (lambda v: v["graphs"]["align"]["spec"]["outputs"].pop(), "loss_local is not in"),
        (lambda v: v["graphs"]["align"]["spec"].update(graph="grounding"), "contradicts"),
    ):
        edit(engine, change, reseal=True)
        with pytest.raises(EngineError, match=word):
            load_manifest(engine)
        shutil.copy(random_engine / MANIFEST_FILE, engine)
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
        open_engines(VerifiedFolder(random_engine, compiled(random_engine, built), {}), asked)
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
