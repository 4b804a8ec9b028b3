"""SD 1.x folders without gated layers or an aligner."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from hcma_fast import HCMAPipeline
from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.methods.plain_checkpoint import (
    check_methods,
    lacks,
    load_plain_components,
)
from hcma_fast.bench.quality.methods.table import Method, Runner
from hcma_fast.errors import UsageError, WeightsError
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import Components

ITEM = EvalItem(id="a", prompt="a dog", layout=Layout(["dog"], [(0.1, 0.1, 0.6, 0.9)]))


@pytest.fixture(scope="module")
def plain_folder(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint as it would be without GLIGEN and HCMA: SD 1.x."""
    folder = tmp_path_factory.mktemp("plain") / "sd"
    shutil.copytree(random_checkpoint, folder)
    shutil.rmtree(folder / "aligner")
    (folder / "hcma.json").unlink()
    gated = UNet2DConditionModel.from_pretrained(random_checkpoint / "unet")
    unet = UNet2DConditionModel.from_config({**gated.config, "attention_type": "default"})
    unet.load_state_dict({k: v for k, v in gated.state_dict().items() if k in unet.state_dict()})
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("name", ["sd", "layout-guidance"])
def test_images_are_those_of_the_gated_checkpoint(
    name: str, plain_folder: Path, random_components: Components
) -> None:
    plain = load_plain_components(str(plain_folder))
    images = [
        Runner(HCMAPipeline.from_components(parts), lambda parts=parts: parts)  # type: ignore[misc]
        .generate(Method.parse(f"{name}:guidance_scale=5"), [ITEM], 3, [1])
        .images[0]
        for parts in (plain, random_components)
    ]
    # the last bits of a gradient may differ between two copies of the weights
    assert abs(images[0].astype(int) - images[1].astype(int)).max() <= 1


def test_what_is_missing_is_named(plain_folder: Path, random_checkpoint: Path) -> None:
    assert lacks(plain_folder, None) == ("gates", "aligner")
    assert lacks(random_checkpoint, None) == ()
    check_methods([Method.parse("boxdiff"), Method.parse("sd")], ("gates", "aligner"), "eager")
    check_methods([Method.parse("gligen")], ("aligner",), "eager")
    for name, without in (("hcma", ("aligner",)), ("gligen", ("gates",)), ("hcma", ("gates",))):
        with pytest.raises(UsageError, match="no "):
            check_methods([Method.parse(name)], without, "eager")
    with pytest.raises(UsageError, match="eager only"):
        check_methods([Method.parse("sd")], ("aligner",), "onnxruntime")


def test_damaged_folders_are_refused(plain_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="config"):
        lacks(tmp_path, None)
    folder = tmp_path / "sd"
    shutil.copytree(plain_folder, folder)
    config = folder / "text_encoder" / "config.json"
    changed = json.loads(config.read_text()) | {"hidden_size": 32}
    config.write_text(json.dumps(changed))
    with pytest.raises(WeightsError):
        load_plain_components(str(folder))
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(WeightsError, match="safetensors' format"):
        load_plain_components(str(folder))
