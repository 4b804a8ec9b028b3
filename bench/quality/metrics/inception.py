"""Inception v3 as FID uses it (Heusel et al. 2017), with weights from a local file.

The network is the graph of 2015-12-05 that TensorFlow published, not torchvision's: average pools
leave the padding out, the last block has a max pool, images are scaled as TensorFlow 1 did. Modules
are named as in pytorch-fid and torch-fidelity, whose weight files fit; neither library is needed,
as both need torchvision, which has no build beside a CPU build of torch on PyPI.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn

from hcma_fast.bench.quality.metrics.fidelity import Features
from hcma_fast.bench.quality.metrics.networks import cut
from hcma_fast.errors import WeightsError
from hcma_fast.layout import Box
from hcma_fast.models.checkpoint.json_files import first_line

SIDE = 299
WIDTH = 2048
_BATCH = 16
_PUBLISHED = "6726825d"
"""First digits of the sha256 of pytorch-fid's and torch-fidelity's files"""
_REMEDY = (
    "Give weights-inception-2015-12-05-6726825d.pth, from github.com/toshas/torch-fidelity/"
    "releases/tag/v0.2.0, or the same tensors as .safetensors."
)


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _row(inputs: int, outputs: int, side: int) -> _Conv:
    return _Conv(inputs, outputs, (1, side), padding=(0, side // 2))


def _column(inputs: int, outputs: int, side: int) -> _Conv:
    return _Conv(inputs, outputs, (side, 1), padding=(side // 2, 0))


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                self.branch_pool(_mean(x)),
            ],
            1,
        )


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _BlockC(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, inner, 1)
        self.branch7x7_2 = _row(inner, inner, 7)
        self.branch7x7_3 = _column(inner, 192, 7)
        self.branch7x7dbl_1 = _Conv(768, inner, 1)
        self.branch7x7dbl_2 = _column(inner, inner, 7)
        self.branch7x7dbl_3 = _row(inner, inner, 7)
        self.branch7x7dbl_4 = _column(inner, inner, 7)
        self.branch7x7dbl_5 = _row(inner, 192, 7)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
                self.branch_pool(_mean(x)),
            ],
            1,
        )


class _BlockD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        crossed = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat(
            [
                self.branch3x3_2(self.branch3x3_1(x)),
                self.branch7x7x3_4(crossed),
                F.max_pool2d(x, 3, 2),
            ],
            1,
        )


class _BlockE(nn.Module):
    def __init__(self, inputs: int, *, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else _mean(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class InceptionV3(nn.Module):
    """Up to the last pool; the classifier is there because the weight files have one."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(128)
        self.Mixed_6c = _BlockC(160)
        self.Mixed_6d = _BlockC(160)
        self.Mixed_6e = _BlockC(192)
        self.Mixed_7a = _BlockD()
        self.Mixed_7b = _BlockE(1280, max_pool=False)
        self.Mixed_7c = _BlockE(2048, max_pool=True)
        self.fc = nn.Linear(WIDTH, 1008)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 299, 299), values 0 to 255 -> (B, 2048) float32."""
        x = (pixels - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pooled: Tensor = x.mean((2, 3))
        return pooled


class InceptionFeatures:
    """Features for FID proper, 2048 a picture."""

    width = WIDTH
    distance = "FID"

    def __init__(self, path: Path) -> None:
        """Read the weights: .safetensors, or a state dict of tensors as .pth.

        Raises:
            WeightsError: the file is missing, damaged, or not of this network.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise WeightsError(
                f"cannot read Inception's weights: {error.strerror}",
                value=str(path),
                remedy=_REMEDY,
            ) from error
        try:
            if path.suffix == ".safetensors":
                tensors = load(content)
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
            with torch.device("meta"):
                net = InceptionV3()
            net.load_state_dict(tensors, assign=True)
        except Exception as error:  # torch.load raises many kinds for a file of another sort
            raise WeightsError(
                f"these are not Inception's weights: {first_line(error)}",
                value=str(path),
                remedy=_REMEDY,
            ) from error
        self.net = net.float().eval().requires_grad_(False)
        digest = hashlib.sha256(content).hexdigest()[:8]
        origin = "" if digest == _PUBLISHED else ", not the published file"
        self.title = f"Inception v3 2015-12-05, 2048, TensorFlow 1 resize, {digest}{origin}"

    def images(self, images: Sequence[Image.Image]) -> Features:
        """Whole images of any size, stretched to 299 x 299."""
        parts = [np.zeros((0, WIDTH), np.float32)]
        for start in range(0, len(images), _BATCH):
            pixels = [resized(image) for image in images[start : start + _BATCH]]
            with torch.no_grad():
                parts.append(self.net(torch.cat(pixels)).numpy())
        return np.concatenate(parts)

    def crops(self, image: Image.Image, boxes: Sequence[Box]) -> Features:
        """The boxes' pixels, no margin."""
        return self.images([cut(image, box) for box in boxes])


def resized(image: Image.Image) -> Tensor:
    """(1, 3, 299, 299), values 0 to 255: bilinear as TensorFlow 1, where pixel i of the result
    lies at i * side / 299 of the image, without smoothing."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]
    return _along(_along(pixels.float(), 2), 3)


def _along(x: Tensor, dim: int) -> Tensor:
    side = x.shape[dim]
    places = torch.arange(SIDE) * (side / SIDE)
    low = places.long()
    high = (low + 1).clamp(max=side - 1)
    share = (places - low).reshape([-1 if d == dim else 1 for d in range(4)])
    return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
