"""Whole engine folders on every backend that builds here, half precision, and other sizes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.errors import BackendError, EngineError, InputError, UsageError
from hcma_fast.export.build import build
from hcma_fast.export.manifest import load_manifest
from hcma_fast.export.target import Target
from hcma_fast.export.weights_file import WEIGHTS_FILE, check_external_data
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import GRAPH_NAMES, STEP_NAMES, BatchRange

LAYOUT = Layout(["dog", "cat"], [[0.0, 0.1, 0.5, 0.6], [0.45, 0.3, 1.0, 1.0]])


def relative_error(pipe: HCMAPipeline, parts: Components, noise: torch.Tensor) -> float:
    """Of the final latents against eager, alignment and both UNet graphs included."""
    arguments = {"latents": noise, "output_type": "latent", "eta0": 2.0, "grounding_beta": 0.5}
    arguments["num_inference_steps"] = 10
    expected = HCMAPipeline.from_components(parts)("a dog", LAYOUT, **arguments).latents  # type: ignore[arg-type]
    found = pipe("a dog", LAYOUT, **arguments).latents  # type: ignore[arg-type]
    return float((found - expected).norm() / expected.norm())


@pytest.mark.usefixtures("exported")
def test_an_openvino_folder_agrees_with_eager(
    random_components: Components, tmp_path: Path
) -> None:
    folder = tmp_path / "engine"
    manifest = build(random_components, folder, Target("openvino"))
    assert manifest == load_manifest(folder) and set(manifest.graphs) == set(GRAPH_NAMES)
    assert all(record.checked == "engine" for record in manifest.graphs.values())
    pipe = HCMAPipeline.from_pretrained(folder)
    assert relative_error(pipe, random_components, torch.randn(1, 4, 8, 8)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "tolerance"),
    [
        (Target("openvino"), 1e-3),
        (
            Target("onnxruntime", precision="float16", batch=BatchRange(1, 1, 1), fuse="step"),
            2e-2,
        ),
        (Target("torch-compile"), 1e-3),
    ],
    ids=["openvino", "float16-static-fused", "torch-compile"],
)
def test_built_folders_agree_with_eager(
    random_components: Components, tmp_path: Path, target: Target, tolerance: float
) -> None:
    folder = tmp_path / "engine"
    manifest = build(random_components, folder, target)
    assert manifest == load_manifest(folder)
    assert all(record.checked == "engine" for record in manifest.graphs.values())
    pipe = HCMAPipeline.from_pretrained(folder)
    assert relative_error(pipe, random_components, torch.randn(1, 4, 8, 8)) < tolerance
    if target.fuse == "step":
        assert set(manifest.graphs) == {*GRAPH_NAMES, *STEP_NAMES}
        with pytest.raises(InputError, match="batches of 1"):
            pipe(["a", "b"], LAYOUT)
        with pytest.raises(UsageError, match="both halves"):
            pipe("a", LAYOUT, guidance_scale=1.0)
        # half of what float32 takes, but for `grounding`
        assert (folder / WEIGHTS_FILE).stat().st_size < 0.8 * 4 * sum(
            parameter.numel()
            for part in (
                random_components.unet,
                random_components.text_encoder,
                random_components.aligner,
                random_components.vae.decoder,
            )
            for parameter in part.parameters()
        )


@pytest.mark.usefixtures("exported")
def test_tensorrt_rtx_builds_without_a_gpu(random_components: Components, tmp_path: Path) -> None:
    target = Target("tensorrt-rtx", architectures=("sm89",))
    assert set(built_for_tensorrt(random_components, tmp_path / "engine", target)) == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["none", "step"])
def test_tensorrt_rtx_builds_in_half_precision_without_a_gpu(
    random_components: Components, tmp_path: Path, fuse: Literal["none", "step"]
) -> None:
    target = Target("tensorrt-rtx", precision="float16", architectures=("sm89",), fuse=fuse)
    products = built_for_tensorrt(random_components, tmp_path / "engine", target)
    for name in load_manifest(tmp_path / "engine").graphs:
        assert (name in products.get("float16", ())) is (name != "grounding")


def built_for_tensorrt(parts: Components, folder: Path, target: Target) -> dict[str, list[str]]:
    """Build and check a folder; the graphs with products in each precision."""
    products: dict[str, list[str]] = {}
    for name, record in build(parts, folder, target).graphs.items():
        assert record.checked == "onnx" and record.parity <= record.tolerance
        assert record.file == f"{name}.engine" and record.engine is not None
        for dtype, count in record.engine.network_product_dtypes.items():
            if count:
                products.setdefault(dtype, []).append(name)
        # all of them fit for a CUDA graph; the second as TensorRT-RTX 1.7.1's compiler noted it
        assert record.engine.user_allocation
        content = (folder / record.file).read_bytes()
        assert b"stream_capturable=1" in content and b"stream_capturable=0" not in content
    assert not list(folder.glob("*.onnx")) and not (folder / WEIGHTS_FILE).exists()
    if not torch.cuda.is_available():
        with pytest.raises(BackendError):
            HCMAPipeline.from_pretrained(folder)
    return products


@pytest.mark.slow
def test_another_image_size_in_an_engine(random_components: Components, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    build(random_components, folder, Target("onnxruntime", height=24, width=32))
    image = HCMAPipeline.from_pretrained(folder)("a dog", LAYOUT, num_inference_steps=2).images[0]
    assert image.size == (32, 24)


@pytest.mark.parametrize("damage", ["absolute", "parent", "symlink", "hard link", "short", "none"])
def test_weights_from_elsewhere_are_refused(
    random_engine: Path, tmp_path: Path, damage: str
) -> None:
    import onnx

    engine = Path(shutil.copytree(random_engine, tmp_path / "engine"))
    graph, weights = engine / "grounding.onnx", engine / WEIGHTS_FILE
    location = {"absolute": str(weights), "parent": f"../engine/{WEIGHTS_FILE}"}.get(damage)
    if location:
        model = onnx.load(graph, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        graph.write_bytes(model.SerializeToString())
    elif damage == "symlink":
        weights.rename(tmp_path / "moved")
        weights.symlink_to(tmp_path / "moved")
    elif damage == "hard link":
        (tmp_path / "twin").hardlink_to(weights)
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:100])
    if damage == "none":
        check_external_data(graph)
        return
    with pytest.raises(EngineError, match="weights"):
        check_external_data(graph)
