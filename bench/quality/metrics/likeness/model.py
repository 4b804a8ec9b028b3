"""The likeness judge: does a box of a picture show its phrase so that the eye names it at once?

It compares a crop with the figure that the phrase means, and knows no category by heart: what it
learns of shape and colour on one figure it applies to all, in both editions of EmojiScenes.
:mod:`training` trains it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from hcma_fast.bench.quality.metrics.likeness.data import (
    category_of,
    cut,
    looks,
    may_be_mirrored,
    pixel_side,
    reference,
)
from hcma_fast.errors import WeightsError
from hcma_fast.layout import Box

ASSETS = Path(__file__).parent / "assets"
WEIGHTS, CARD = "likeness.safetensors", "likeness.json"
_RESTORE = f"Restore its assets, or train again: python -m {__package__}.training."


class LikenessNet(nn.Module):
    """A CNN of 0.25 M parameters on a crop, its reference, and their difference."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((10, 32, 2), (32, 64, 1), (64, 96, 2), (96, 128, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, crops: Tensor, references: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] and (B, 4, S, S) -> logits (B,): is it what it should be?"""
        crops, mask = crops * 2 - 1, references[:, 3:]
        both = torch.cat([crops, references, (crops - references[:, :3]) * mask], dim=1)
        cells = self.features(both)
        pooled = torch.cat([cells.mean((2, 3)), cells.amax((2, 3))], dim=1)
        logits: Tensor = self.head(F.dropout(pooled, 0.3, self.training))
        return logits[:, 0]


class LikenessCard(BaseModel):
    """likeness.json: what the weights are, and how well they agree with the labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    seed: int
    steps: tuple[int, int]
    """with what was spoilt by rule, then with labelled boxes too"""
    batch: int
    threshold: float
    """least probability of what is recognised; chosen on the half "train" """
    labelled_train: int
    labelled_test: int
    agreement_train: float
    agreement_test: float
    """share of boxes on which it agrees with the labels, "half" counting as not recognised"""
    lenient_agreement_test: float
    """the same, "half" counting as recognised, at :attr:`lenient_threshold`"""
    lenient_threshold: float
    """chosen as the other one"""
    auc_right_test: float
    """area under the curve of "right" against "half" and "wrong" """
    auc_wrong_test: float
    """of "right" and "half" against "wrong" """
    old_agreement_test: float
    """agreement of the fourth edition's judge, "half" counting as not recognised"""
    old_lenient_agreement_test: float
    second_agreement_test: float
    """agreement of a second, blind labelling: a judge cannot be expected to agree more"""
    second_lenient_agreement_test: float


class LikenessJudge:
    """Tells whether boxes show their phrases. Make one by :meth:`load`."""

    def __init__(self, net: LikenessNet, card: LikenessCard) -> None:
        self.net = net.eval().requires_grad_(False)
        self.card, self.threshold = card, card.threshold

    @classmethod
    def load(cls, folder: Path = ASSETS) -> LikenessJudge:
        """Read likeness.json and likeness.safetensors.

        Raises:
            WeightsError: a file is missing, or the weights are not those that the card describes.
        """
        try:
            card = LikenessCard.model_validate_json((folder / CARD).read_bytes())
            content = (folder / WEIGHTS).read_bytes()
            found = hashlib.sha256(content).hexdigest()
            if found != card.sha256:
                raise WeightsError(
                    f"the judge's weights are not the ones of its card ({card.sha256[:12]}...)",
                    value=found,
                    remedy=_RESTORE,
                )
            net = LikenessNet()
            net.load_state_dict({name: value.float() for name, value in load(content).items()})
        except (OSError, ValidationError, SafetensorError, RuntimeError) as error:
            raise WeightsError(
                f"the judge cannot be loaded: {error}",
                value=str(folder),
                remedy=_RESTORE,
            ) from error
        return cls(net, card)

    @torch.no_grad()
    def probabilities(
        self,
        picture: NDArray[np.uint8],
        boxes: Sequence[Box],
        phrases: Sequence[Sequence[str]],
        edition: int,
    ) -> list[NDArray[np.float64]]:
        """For each box the probability of each of its phrases; figures that an edition mirrors are
        compared in both facings.

        Args:
            picture: (H, W, 3) uint8, square.
            phrases: for each box, those to compare with.
        """
        rows: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []
        counts: list[list[int]] = []
        for box, names in zip(boxes, phrases, strict=True):
            crop, side = cut(picture, box), pixel_side(box, picture.shape[0])
            counts.append([])
            for name in names:
                wanted = reference(edition, name, side)
                facings = [wanted]
                if may_be_mirrored(edition, name):
                    facings.append(np.ascontiguousarray(wanted[..., ::-1]))
                rows += [(crop, facing) for facing in facings]
                counts[-1].append(len(facings))
        if not rows:
            return [np.zeros(0) for _ in boxes]
        crops = torch.from_numpy(np.stack([crop for crop, _ in rows])).permute(0, 3, 1, 2) / 255
        wanteds = torch.from_numpy(np.stack([wanted for _, wanted in rows]))
        logits = torch.cat(
            [self.net(a, b) for a, b in zip(crops.split(256), wanteds.split(256), strict=True)]
        )
        values = iter(logits.double().sigmoid().tolist())
        return [
            np.array([max(next(values) for _ in range(facings)) for facings in some])
            for some in counts
        ]

    def recognised(
        self,
        picture: NDArray[np.uint8],
        boxes: Sequence[Box],
        phrases: Sequence[str],
        edition: int,
    ) -> list[bool]:
        """Does each box show its phrase? The arguments are those of :meth:`probabilities`, with one
        phrase a box."""
        values = self.probabilities(picture, boxes, [[name] for name in phrases], edition)
        return [bool(value[0] >= self.threshold) for value in values]

    def colours_seen(
        self, picture: NDArray[np.uint8], boxes: Sequence[Box], phrases: Sequence[str]
    ) -> list[str]:
        """Which look of its phrase's category each box of the second edition is most like."""
        names = [colours_of(phrase) for phrase in phrases]
        values = self.probabilities(picture, boxes, names, edition=2)
        return [some[int(value.argmax())] for some, value in zip(names, values, strict=True)]


def colours_of(phrase: str) -> list[str]:
    """The second edition's phrases of the same category."""
    return [name for name in looks(2) if category_of(name) == category_of(phrase)]
