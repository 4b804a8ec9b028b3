"""Networks that look at images: features for FID and its kin, and CLIP's text-image cosine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hcma_fast.bench.quality.metrics.fidelity import Features
from hcma_fast.bench.quality.metrics.judge.data import crop, to_tensor
from hcma_fast.bench.quality.metrics.judge.model import Judge
from hcma_fast.bench.quality.metrics.pretrained import load_pretrained
from hcma_fast.errors import InputError, WeightsError
from hcma_fast.layout import Box

_BATCH = 32


class FeatureNetwork(Protocol):
    """Images or crops to feature vectors."""

    @property
    def title(self) -> str:
        """What tables call it."""
        ...

    @property
    def width(self) -> int:
        """D, entries of a vector."""
        ...

    @property
    def distance(self) -> str:
        """What tables call the Frechet distance on it: FID on Inception's features only."""
        ...

    def images(self, images: Sequence[Image.Image]) -> Features:
        """Whole images: (N, D) float32."""
        ...

    def crops(self, image: Image.Image, boxes: Sequence[Box]) -> Features:
        """Boxes of one image, xyxy in [0, 1]: (M, D) float32."""
        ...


class JudgeFeatures:
    """The judge's last layer before its read-out: Inception knows nothing of EmojiScenes."""

    title = "EmojiScenes, judge features"
    width = 256
    distance = "Frechet distance"

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def images(self, images: Sequence[Image.Image]) -> Features:
        """At their own size, which must be one; the network is convolutional."""
        pixels = to_tensor([np.asarray(image.convert("RGB")) for image in images])
        return self._run(pixels)

    def crops(self, image: Image.Image, boxes: Sequence[Box]) -> Features:
        """As the judge cuts them: with a margin, 32 x 32."""
        if not boxes:
            return np.zeros((0, self.width), np.float32)
        return self._run(to_tensor([crop(image, box) for box in boxes]))

    @torch.no_grad()
    def _run(self, pixels: Tensor) -> Features:
        parts = []
        for some in pixels.split(_BATCH):
            cells = self.judge.net.features(some * 2 - 1)
            parts.append(torch.cat([cells.mean((2, 3)), cells.amax((2, 3))], dim=1))
        found: Features = torch.cat(parts).numpy()
        return found


class VisionFeatures:
    """The pooled output of a vision model of transformers, such as DINOv2 or CLIP's."""

    distance = "Frechet distance"

    def __init__(self, name: str) -> None:
        """Load from a folder or hub id, safetensors only.

        Raises:
            WeightsError: it does not load, or gives no pooled output.
        """
        # here and below: half a minute of imports on a busy machine, for those who use them
        from transformers import AutoImageProcessor, AutoModel

        model = load_pretrained(AutoModel, name)
        self._model = getattr(model, "vision_model", model)
        self._processor = load_pretrained(AutoImageProcessor, name)
        self.title = f"features of {Path(name).name}"
        self.width = self._run([Image.new("RGB", (64, 64))]).shape[1]

    def images(self, images: Sequence[Image.Image]) -> Features:
        """As the model's own processor scales them."""
        parts = [self._run(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
        return np.concatenate(parts)

    def crops(self, image: Image.Image, boxes: Sequence[Box]) -> Features:
        """The boxes' pixels, no margin."""
        if not boxes:
            return np.zeros((0, self.width), np.float32)
        return self.images([cut(image, box) for box in boxes])

    @torch.no_grad()
    def _run(self, images: Sequence[Image.Image]) -> Features:
        inputs = self._processor(images=list(images), return_tensors="pt")
        pooled = getattr(self._model(pixel_values=inputs["pixel_values"]), "pooler_output", None)
        if pooled is None:
            raise WeightsError(
                "this vision model has no pooled output",
                value=type(self._model).__name__,
                remedy="Use one such as DINOv2, ViT or CLIP.",
            )
        found: Features = pooled.flatten(1).float().numpy()
        return found


class ClipScorer:
    """Cosine of CLIP's image and text embeddings: raw, neither clipped at 0 nor times 100."""

    def __init__(self, name: str) -> None:
        """Load from a folder or hub id; the paper reports ViT-B/32.

        Raises:
            WeightsError: it does not load.
        """
        from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

        self._model = load_pretrained(CLIPModel, name)
        self._processor = load_pretrained(AutoImageProcessor, name)
        self._tokenizer = load_pretrained(CLIPTokenizer, name)
        self.title = f"CLIP {Path(name).name}"
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> NDArray[np.float32]:
        """One per pair of image and text, in [-1, 1]: (N,) float32.

        Raises:
            InputError: a text is longer than CLIP takes.
        """
        if not images:
            return np.zeros(0, np.float32)
        inputs = self._processor(images=list(images), return_tensors="pt")
        seen = self._model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        meant = torch.cat([self._text(text) for text in texts])
        cosine = torch.nn.functional.cosine_similarity(seen.float(), meant.float())
        found: NDArray[np.float32] = cosine.numpy()
        return found

    def _text(self, text: str) -> Tensor:
        if text not in self._texts:
            ids = self._tokenizer(text, return_tensors="pt").input_ids
            most = self._model.config.text_config.max_position_embeddings
            if ids.shape[1] > most:
                raise InputError(
                    f"CLIP takes {most} tokens, a text has {ids.shape[1]}",
                    value=text[:80],
                    remedy="Shorten it, or leave out clip.",
                )
            output = self._model.get_text_features(input_ids=ids)
            self._texts[text] = output.pooler_output
        return self._texts[text]


def cut(image: Image.Image, box: Box) -> Image.Image:
    """The pixels of a box, xyxy in [0, 1]; a pixel or more along each side."""
    width, height = image.size
    left, top = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    right, bottom = round(box[2] * width), round(box[3] * height)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
