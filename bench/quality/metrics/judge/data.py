"""Crops for the judge: how a box is cut out of a picture, and training batches with damage.

The damage is that of a small VAE and of a denoiser (softness, colour shift, blotches, noise), so
that the judge learns identity and not sharpness. What is left of an object at 2 or 3 pixels a side
is no object: such blobs are examples of the class "none", as are pieces of background.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from hcma_fast.train.data.emoji_scenes import CATEGORY_NAMES, Scene, sample_scene

Box = tuple[float, float, float, float]
CROP_SIDE = 32
MARGIN = 0.08
"""Context on each side of a box, as a share of the box."""
NONE = "none"
CLASSES: tuple[str, ...] = (*CATEGORY_NAMES, NONE)
_NONE_SHARE = 0.12
MAX_COVER = 0.15
"""Share of a background crop that objects may cover."""


def crop(image: Image.Image, box: Box) -> NDArray[np.uint8]:
    """``box`` (xyxy in [0, 1]) and its margin, clipped to the image: (32, 32, 3) uint8."""
    width, height = image.size
    dx, dy = MARGIN * (box[2] - box[0]), MARGIN * (box[3] - box[1])
    x0, x1 = _pixels(box[0] - dx, box[2] + dx, width)
    y0, y1 = _pixels(box[1] - dy, box[3] + dy, height)
    side = (CROP_SIDE, CROP_SIDE)
    return np.asarray(image.resize(side, Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)))


def _pixels(low: float, high: float, size: int) -> tuple[float, float]:
    """Shares of the image to pixels inside it, at least one pixel apart."""
    start = min(max(low * size, 0.0), size - 1.0)
    return start, max(min(high * size, float(size)), start + 1.0)


def to_tensor(crops: Sequence[NDArray[np.uint8]]) -> Tensor:
    """B crops -> (B, 3, 32, 32) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def cover(box: Box, objects: Sequence[Box]) -> float:
    """Share of ``box`` that the boxes of objects cover (an overlap of two counts twice)."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    total = 0.0
    for other in objects:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        total += max(width, 0.0) * max(height, 0.0)
    return total / area


def background_box(rng: np.random.Generator, scene: Scene) -> Box | None:
    """A random box that shows background, or None when a crowded scene has no room for one."""
    for _ in range(20):
        width, height = rng.uniform(0.15, 0.6, size=2)
        x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        box = (float(x), float(y), float(x + width), float(y + height))
        if cover(box, [item.box for item in scene.objects]) < MAX_COVER:
            return box
    return None


def jitter(rng: np.random.Generator, box: Box, amount: float = 0.08) -> Box:
    """``box`` with each edge moved by up to ``amount`` of its side."""
    width, height = box[2] - box[0], box[3] - box[1]
    shift = rng.uniform(-amount, amount, size=4) * (width, height, width, height)
    x0, y0, x1, y1 = (float(min(max(v, 0.0), 1.0)) for v in np.array(box) + shift)
    return x0, y0, x1, y1


class JudgeCrops:
    """Crops of the renders 0 .. len-1 of the split "judge", drawn by step number."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = images
        self.scenes = [sample_scene("judge", index) for index in range(len(images))]

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Damaged crops (B, 3, 32, 32) in [0, 1] and their classes (B,) int64."""
        rng = np.random.default_rng([9, step])
        crops: list[NDArray[np.uint8]] = []
        labels: list[int] = []
        while len(crops) < size:
            index = int(rng.integers(len(self.scenes)))
            scene, image = self.scenes[index], Image.fromarray(self.images[index])
            item = scene.objects[int(rng.integers(len(scene.objects)))]
            box, label = jitter(rng, item.box), CLASSES.index(item.category)
            kind = rng.random()
            if kind < _NONE_SHARE:
                found = background_box(rng, scene)
                if found is None:
                    continue
                box, label = found, CLASSES.index(NONE)
            piece = crop(image, box)
            if _NONE_SHARE <= kind < 1.5 * _NONE_SHARE:
                piece, label = _blob(rng, piece), CLASSES.index(NONE)
            crops.append(piece)
            labels.append(label)
        generator = torch.Generator().manual_seed(step)
        return damage(to_tensor(crops), generator), torch.tensor(labels)


def _blob(rng: np.random.Generator, piece: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a failed generator draws: the object's colours and no shape."""
    few = int(rng.integers(2, 4))
    small = Image.fromarray(piece).resize((few, few), Image.Resampling.BOX)
    return np.asarray(small.resize((CROP_SIDE, CROP_SIDE), Image.Resampling.BICUBIC))


def damage(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur, colour shift, blotches and noise, each crop its own: (B, 3, s, s) in [0, 1]."""
    count, channels, side, _ = crops.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    sigma = uniform(0.05, 2.2, 1) * (uniform(0, 1, 1) < 0.7) + 0.05
    taps = torch.arange(-5, 6)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    weights = (weights / weights.sum(-1, keepdim=True)).repeat_interleave(channels, 0)
    planes = F.pad(crops, (5, 5, 5, 5), mode="replicate").reshape(
        1, count * channels, side + 10, -1
    )
    planes = F.conv2d(planes, weights[:, None, None, :], groups=count * channels)
    planes = F.conv2d(planes, weights[:, None, :, None], groups=count * channels)
    out = planes.reshape(crops.shape)
    grey = out.mean(dim=1, keepdim=True)
    out = grey + uniform(0.7, 1.3, 1, 1, 1) * (out - grey)
    out = out * uniform(0.8, 1.2, channels, 1, 1) + uniform(-0.08, 0.08, channels, 1, 1)
    blotches = torch.randn(count, channels, side // 4, side // 4, generator=generator)
    blotches = F.interpolate(blotches, size=(side, side), mode="bilinear")
    noise = torch.randn(crops.shape, generator=generator)
    out = out + uniform(0, 0.08, 1, 1, 1) * blotches + uniform(0, 0.06, 1, 1, 1) * noise
    return out.clamp(0, 1)


def blurred(image: Image.Image, radius: float = 1.0) -> Image.Image:
    """The whole picture out of focus: ``radius`` is the Gaussian's sigma in pixels of 64."""
    return image.filter(ImageFilter.GaussianBlur(radius * image.size[0] / 64))
