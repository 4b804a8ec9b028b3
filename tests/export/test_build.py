"""Building engine folders, and what happens when something goes wrong on the way."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.errors import BackendError, EngineError, InputError, UsageError
from hcma_fast.export import build as build_module
from hcma_fast.export.build import build
from hcma_fast.export.cache import find_or_build
from hcma_fast.export.key import key_of, key_parts
from hcma_fast.export.manifest import MANIFEST_FILE, load_manifest
from hcma_fast.export.target import Target
from hcma_fast.export.weights_file import WEIGHTS_FILE
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import GRAPH_NAMES

ORT = Target(backend="onnxruntime")


LAYOUTS = [
    Layout(["dog", "cat"], [[0.0, 0.1, 0.5, 0.6], [0.45, 0.3, 1.0, 1.0]]),
    Layout.empty(),
]


def test_folder_holds_six_validated_graphs(
    random_engine: Path, random_components: Components
) -> None:
    manifest = load_manifest(random_engine)
    assert set(manifest.graphs) == set(GRAPH_NAMES)
    for name, record in manifest.graphs.items():
        assert record.spec == random_components.specs()[name]
        assert record.checked == "engine"
        assert 0 <= record.parity <= record.tolerance <= 1e-4
        assert (random_engine / record.file).stat().st_size == record.size_bytes
    assert manifest.weights_hash == random_components.weights_hash
    assert manifest.key == key_of(key_parts(random_components.weights_hash, ORT))
    assert manifest.target == ORT
    on_disk = {p.relative_to(random_engine).as_posix() for p in random_engine.rglob("*.*")}
    assert on_disk == {*manifest.files, MANIFEST_FILE}


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"grounding_beta": 0.3}])
def test_pipeline_agrees_with_eager_over_50_steps(
    random_engine: Path, random_components: Components, settings: dict[str, float]
) -> None:
    eager = HCMAPipeline.from_components(random_components)
    compiled = HCMAPipeline.from_pretrained(random_engine)
    assert (compiled.backend, compiled.components) == ("onnxruntime", None)
    arguments = {"seed": 3, "output_type": "latent", "eta0": 2.0, **settings}
    a = eager(["a dog and a cat", "nothing"], LAYOUTS, **arguments)  # type: ignore[arg-type]
    b = compiled(["a dog and a cat", "nothing"], LAYOUTS, **arguments)  # type: ignore[arg-type]
    assert (a.latents - b.latents).norm() / a.latents.norm() < 1e-3
    assert len(a.losses) == len(b.losses) == 50
    for one, other in zip(a.losses, b.losses, strict=True):
        torch.testing.assert_close(one.loss_local, other.loss_local, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("arguments", [{"precision": "float16"}, {"aligner": "elsewhere"}])
def test_an_engine_folder_takes_no_precision_and_no_aligner(
    random_engine: Path, arguments: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="engine folder"):
        HCMAPipeline.from_pretrained(random_engine, **arguments)  # type: ignore[arg-type]


def test_an_engine_folder_runs_where_its_backend_does(random_engine: Path) -> None:
    with pytest.raises(BackendError, match="onnxruntime does not run on this device"):
        HCMAPipeline.from_pretrained(random_engine, device="meta")


def test_engines_of_another_version_or_machine_are_refused(
    random_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcma_fast.export.target.onnxruntime_version", lambda: "0.0")
    with pytest.raises(EngineError, match=r"built with onnxruntime 1\.") as caught:
        HCMAPipeline.from_pretrained(random_engine)
    assert caught.value.exit_code == 6


def test_equal_weights_are_stored_once(random_engine: Path, random_components: Components) -> None:
    unet = sum(p.numel() * 4 for p in random_components.unet.parameters())
    everything = sum(
        sum(p.numel() * 4 for p in part.parameters())
        for part in (
            random_components.text_encoder,
            random_components.aligner,
            random_components.vae.decoder,
        )
    )
    size = (random_engine / WEIGHTS_FILE).stat().st_size
    # two UNet graphs and the grounding's share of them, in the space of one
    assert size < 1.05 * (unet + everything)


def test_refuses_to_replace_what_it_did_not_write(
    tmp_path: Path, random_components: Components, random_engine: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an engine folder"):
        build(random_components, tmp_path, ORT, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError, match="--force"):
        build(random_components, random_engine, ORT)


def test_unknown_and_missing_backends(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="Backends: onnxruntime"):
        Target(backend="caffe")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install .*hcma-fast\[cpu\]"):
        build(random_components, tmp_path / "x", ORT)
    assert not (tmp_path / "x").exists()


def test_unwritable_places_are_typed_errors(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"):
        build(random_components, tmp_path / "file" / "engine", ORT)
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="HCMA_FAST_CACHE"):
        find_or_build(random_components.weights_hash, lambda: random_components, ORT)


def test_a_failed_validation_leaves_nothing(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "compare", lambda *args: 0.5)
    with pytest.raises(EngineError, match="text_encoder does not agree"):
        build(random_components, tmp_path / "engine", ORT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "heavy", "order"),
    [
        ("abcdef", "cf", "cabfde"),
        ("abc", "", "abc"),
        ("abcd", "d", "dabc"),
        ("ab", "ab", "ab"),
        ("abcdefg", "beg", "bacedfg"),
    ],
)
def test_light_graphs_are_exported_while_heavy_ones_are_compiled(
    names: str, heavy: str, order: str
) -> None:
    found = build_module.in_turns(list(names), list(heavy))  # type: ignore[arg-type]
    assert "".join(found) == order


def test_heavy_graphs_wait_for_each_other_and_a_failure_ends_the_build(
    random_components: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is a stand-in: what is tested is who waits for whom."""
    events: list[str] = []
    begun = threading.Event()

    def export(source: object, spec: Any, folder: Path, *rest: object) -> Any:
        events.append(f"export {spec.graph}")
        if spec.graph == "text_encoder":
            assert begun.wait(10), "the heavy graph is compiled meanwhile"
        return build_module._Checked(folder / f"{spec.graph}.onnx", 0.0, 1.0, 0.0)

    def compile_(checked: Any, spec: Any, *rest: object) -> Any:
        begun.set()
        if spec.graph == "unet_plain":
            raise EngineError("no such layer", value="x", remedy="None.")
        time.sleep(0.2)
        events.append(f"compiled {spec.graph}")
        return None

    counts = {name: 10 for name in GRAPH_NAMES} | {"unet_grounded": 10**9, "unet_plain": 10**9}
    monkeypatch.setattr(build_module, "graph_weights", lambda source, target: counts)
    monkeypatch.setattr(build_module, "check_resources", lambda *args: None)
    monkeypatch.setattr(build_module, "_export_one", export)
    monkeypatch.setattr(build_module, "_compile_one", compile_)
    monkeypatch.setattr(build_module, "_free_memory", lambda: time.sleep(0.05))
    with pytest.raises(EngineError, match="no such layer"):
        build_module.build(random_components, tmp_path / "engine", Target("onnxruntime"))
    assert events.index("compiled unet_grounded") < events.index("export unet_plain")
    assert events.index("export grounding") < events.index("export unet_plain")
    assert "export vae_decoder" not in events, "the build went on after a graph had failed"
    assert not list(tmp_path.iterdir())
