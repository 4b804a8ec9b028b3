"""The judge: which of 24 EmojiScenes categories, or none, does a box of a picture show?

Train it by ``python -m hcma_fast.bench.quality.metrics.judge.model --out .runs/judge``: minutes on
one core, resumable. It learns from renders of the split "judge", which the generator never sees.
``assets/`` beside this file holds it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from hcma_fast.bench.quality.metrics.judge.data import (
    CLASSES,
    CROP_SIDE,
    NONE,
    Box,
    JudgeCrops,
    background_box,
    blurred,
    crop,
    to_tensor,
)
from hcma_fast.errors import WeightsError
from hcma_fast.train.data.emoji_scenes import render_scene, sample_scene
from hcma_fast.train.data.scenes_cache import rendered_scenes
from hcma_fast.train.loop.loop import LoopConfig, run

ASSETS = Path(__file__).parent / "assets"
_TRAIN = "python -m hcma_fast.bench.quality.metrics.judge.model"
_WEIGHTS, _CARD = "judge.safetensors", "judge.json"
_SEED = 0


class JudgeNet(nn.Module):
    """A plain CNN of 0.2 M parameters: four convolutions, mean and maximum, linear read-out."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 32, 1), (32, 64, 2), (64, 96, 2), (96, 128, 2)):
            layers += [
                nn.Conv2d(before, after, 3, stride, 1),
                nn.GroupNorm(8, after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(256, classes)

    def forward(self, crops: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [0, 1] -> logits (B, classes)."""
        cells = self.features(crops * 2 - 1)
        logits: Tensor = self.head(torch.cat([cells.mean((2, 3)), cells.amax((2, 3))], dim=1))
        return logits


class JudgeCard(BaseModel):
    """judge.json: what the weights are and how good they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[str, ...]
    crop_side: int
    sha256: str
    seed: int
    steps: int
    batch: int
    train_scenes: int
    held_out_scenes: int
    accuracy_clean: float
    """share of right verdicts on held-out renders, background crops included"""
    accuracy_blurred: float
    """the same on pictures blurred with a sigma of one pixel in 64"""


CONFIDENCE_FLOOR = math.log(0.01)
"""Least log-probability that a box counts with: one lost object should not outweigh many that are a
little clearer (docs/decisions.md)"""


class Verdict(NamedTuple):
    """The likeliest class of a box and its probability."""

    category: str
    probability: float


class Judge:
    """Tells what boxes show. Make one by :meth:`load`."""

    def __init__(self, net: JudgeNet, card: JudgeCard) -> None:
        self.net = net.eval().requires_grad_(False)
        self.card = card

    @classmethod
    def load(cls, folder: Path = ASSETS) -> Judge:
        """Read judge.json and judge.safetensors.

        Raises:
            WeightsError: a file is missing, or the weights are not those that the card describes.
        """
        try:
            card = JudgeCard.model_validate_json((folder / _CARD).read_bytes())
            content = (folder / _WEIGHTS).read_bytes()
            found = hashlib.sha256(content).hexdigest()
            if found != card.sha256:
                raise WeightsError(
                    f"the judge's weights are not the ones of its card ({card.sha256[:12]}...)",
                    value=found,
                    remedy=f"Restore them, or train again: {_TRAIN}.",
                )
            net = JudgeNet(len(card.classes))
            net.load_state_dict({name: value.float() for name, value in load(content).items()})
        except (OSError, ValidationError, SafetensorError, RuntimeError) as error:
            raise WeightsError(
                f"the judge cannot be loaded: {error}",
                value=str(folder),
                remedy=f"Restore {ASSETS}, or train again: {_TRAIN}.",
            ) from error
        return cls(net, card)

    def predict(
        self, images: NDArray[np.uint8], boxes: Sequence[Sequence[Box]]
    ) -> list[list[Verdict]]:
        """What each box shows; the arguments are those of :meth:`log_probabilities`."""
        return self.verdicts(self.log_probabilities(images, boxes))

    def verdicts(self, values: Sequence[Tensor]) -> list[list[Verdict]]:
        """The likeliest class of each box, from what :meth:`log_probabilities` returned."""
        best = [some.max(-1) for some in values]
        return [
            [
                Verdict(self.card.classes[index], probability)
                for index, probability in zip(
                    some.indices.tolist(), some.values.exp().tolist(), strict=True
                )
            ]
            for some in best
        ]

    @torch.no_grad()
    def log_probabilities(
        self, images: NDArray[np.uint8], boxes: Sequence[Sequence[Box]]
    ) -> list[Tensor]:
        """Per image (boxes, classes) float32: the logarithm of each class's probability.

        Args:
            images: (B, H, W, 3) uint8.
            boxes: per image any number of boxes, xyxy in [0, 1].
        """
        crops = [
            crop(picture, box)
            for picture, some in zip(map(Image.fromarray, images), boxes, strict=True)
            for box in some
        ]
        if not crops:
            return [torch.zeros(0, len(self.card.classes)) for _ in boxes]
        logits = torch.cat([self.net(part) for part in to_tensor(crops).split(256)])
        values: list[Tensor] = list(logits.log_softmax(-1).split([len(some) for some in boxes]))
        return values

    def of_categories(self, values: Tensor, categories: Sequence[str]) -> NDArray[np.float64]:
        """(boxes,) the log-probability of what each box should show.

        Args:
            values: (boxes, classes) of one image, from :meth:`log_probabilities`.
            categories: one of ``card.classes`` per box.
        """
        wanted = np.array([self.card.classes.index(name) for name in categories], np.int64)
        found: NDArray[np.float64] = values.double().numpy()[np.arange(len(wanted)), wanted]
        return found


def held_out_accuracy(
    judge: Judge, start: int, count: int, blur: bool = False
) -> tuple[float, Counter[tuple[str, str]]]:
    """Accuracy on the renders start .. start+count-1 of the split "judge", and the mistakes made.

    Each picture adds one background box where it has room for one.
    """
    pictures, boxes, expected = [], [], []
    for index in range(start, start + count):
        scene = sample_scene("judge", index)
        picture = render_scene(scene, "judge", index)
        pictures.append(np.asarray(blurred(picture) if blur else picture))
        empty = background_box(np.random.default_rng([10, index]), scene)
        boxes.append([item.box for item in scene.objects] + ([empty] if empty else []))
        expected.append([item.category for item in scene.objects] + ([NONE] if empty else []))
    pairs = [
        (wanted, verdict.category)
        for names, verdicts in zip(expected, judge.predict(np.stack(pictures), boxes), strict=True)
        for wanted, verdict in zip(names, verdicts, strict=True)
    ]
    mistakes = Counter(pair for pair in pairs if pair[0] != pair[1])
    return 1 - mistakes.total() / len(pairs), mistakes


def train(out: Path, steps: int, batch: int, scenes: int) -> JudgeNet:
    """Train from the newest state in ``out``; the same arguments give the same data."""
    torch.manual_seed(_SEED)
    data = JudgeCrops(rendered_scenes(out, "judge", scenes, workers=1))
    model = JudgeNet(len(CLASSES))

    def loss_of_step(step: int) -> dict[str, Tensor]:
        crops, labels = data.batch(step, batch)
        logits = model(crops)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).float().mean()}

    config = LoopConfig(steps=steps, lr=3e-3, weight_decay=0.01, ema_decay=0.99, log_every=100)
    averaged = run(model, loss_of_step, config, out / "state")
    assert isinstance(averaged, JudgeNet)
    return averaged


def store(net: JudgeNet, folder: Path, steps: int, batch: int, scenes: int, held_out: int) -> Judge:
    """Write the weights as fp16 and then the card, measured on what was stored."""
    content = save({name: value.half().contiguous() for name, value in net.state_dict().items()})
    rounded = JudgeNet(len(CLASSES))
    rounded.load_state_dict({name: value.float() for name, value in load(content).items()})
    draft = JudgeCard(
        classes=CLASSES,
        crop_side=CROP_SIDE,
        sha256=hashlib.sha256(content).hexdigest(),
        seed=_SEED,
        steps=steps,
        batch=batch,
        train_scenes=scenes,
        held_out_scenes=held_out,
        accuracy_clean=0,
        accuracy_blurred=0,
    )
    clean, mistakes = held_out_accuracy(Judge(rounded, draft), scenes, held_out)
    soft, soft_mistakes = held_out_accuracy(Judge(rounded, draft), scenes, held_out, blur=True)
    print(
        json.dumps({"clean": clean, "wanted, seen, times": mistakes.most_common(12)}, default=str)
    )
    print(
        json.dumps(
            {"blurred": soft, "wanted, seen, times": soft_mistakes.most_common(12)}, default=str
        )
    )
    card = draft.model_copy(
        update={"accuracy_clean": round(clean, 4), "accuracy_blurred": round(soft, 4)}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (
        (_WEIGHTS, content),
        (_CARD, (json.dumps(card.model_dump(), indent=2) + "\n").encode()),
    ):
        partial = folder / f".{name}.part"
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / name)
    return Judge(rounded, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".runs/judge"))
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--held-out", type=int, default=600)
    args = parser.parse_args()
    net = train(args.out, args.steps, args.batch, args.scenes)
    store(net, args.assets, args.steps, args.batch, args.scenes, args.held_out)


if __name__ == "__main__":
    main()
