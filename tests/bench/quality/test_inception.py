"""Inception's features: those of torch-fidelity, whatever file format the weights have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hcma_fast.bench.quality.metrics.inception import SIDE, InceptionFeatures, InceptionV3, resized
from hcma_fast.errors import WeightsError


def random_weights() -> dict[str, Tensor]:
    """From numpy's generator, which gives the same numbers everywhere."""
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in InceptionV3().state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        if name.endswith(("running_var", "bn.weight")):
            values = rng.uniform(0.5, 1.5, shape)
        elif len(shape) > 1:
            values = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        else:
            values = rng.normal(0, 0.1, shape)
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(random_weights(), path)
    return path


@pytest.fixture(scope="module")
def features(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(weights)


#: torch-fidelity 0.4.0's FeatureExtractorInceptionV3("2048") with these weights, first 4 entries
REFERENCE: dict[tuple[int, int], list[float]] = {
    (64, 64): [2.5592628, 37.326714, 22.604422, 22.980026],
    (512, 400): [2.3792760, 32.363529, 19.788172, 19.937069],
    (17, 600): [1.8421175, 30.178474, 17.584568, 17.799538],
}


@pytest.mark.slow
@pytest.mark.parametrize("size", list(REFERENCE))
def test_features_are_torch_fidelitys(features: InceptionFeatures, size: tuple[int, int]) -> None:
    (found,) = features.images([picture(*size)])
    assert found[:4].tolist() == pytest.approx(REFERENCE[size], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_pth_file_gives_the_same_and_crops_are_pictures_of_their_own(
    features: InceptionFeatures, tmp_path: Path
) -> None:
    torch.save(random_weights(), tmp_path / "weights.pth")
    other = InceptionFeatures(tmp_path / "weights.pth")
    image = picture(64, 48)
    left, right = other.crops(image, [(0, 0, 0.5, 1), (0.5, 0, 1, 1)])
    assert left.tolist() == features.images([image.crop((0, 0, 32, 48))])[0].tolist()
    assert np.abs(left - right).max() > 1e-3
    assert other.crops(image, []).shape == (0, 2048)
    assert other.distance == "FID" and other.title.endswith("not the published file")
    assert other.title != features.title


@pytest.mark.parametrize("size", [(64, 64), (400, 299), (17, 600)])
def test_pictures_are_scaled_as_tensorflow_1_does(size: tuple[int, int]) -> None:
    image = picture(*size)
    pixels, found = np.asarray(image).astype(float), resized(image)[0].numpy()
    assert found.shape == (3, SIDE, SIDE)
    for row, column in ((0, 0), (150, 3), (298, 298)):
        y, x = row * size[1] / SIDE, column * size[0] / SIDE
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, size[1] - 1), min(x0 + 1, size[0] - 1)
        top = pixels[y0, x0] * (1 - (x - x0)) + pixels[y0, x1] * (x - x0)
        bottom = pixels[y1, x0] * (1 - (x - x0)) + pixels[y1, x1] * (x - x0)
        expected = top * (1 - (y - y0)) + bottom * (y - y0)
        assert found[:, row, column] == pytest.approx(expected, abs=0.05)


def test_a_missing_or_other_file_is_refused_with_the_place_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot read .*torch-fidelity/releases"):
        InceptionFeatures(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save(InceptionV3, tmp_path / "pickle.pth")
    for name in ("text.pth", "text.safetensors", "other.safetensors", "other.pth", "pickle.pth"):
        with pytest.raises(WeightsError, match="not Inception's weights"):
            InceptionFeatures(tmp_path / name)
