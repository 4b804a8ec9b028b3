"""Look at an evaluation's images: judge, features, CLIP and detector, a file per block."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hcma_fast.bench.quality.generate import (
    WHOLE,
    Progress,
    RunSettings,
    Shard,
    finished,
    image_files,
)
from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.methods.table import Method
from hcma_fast.bench.quality.metrics.detection import Detection, Detector
from hcma_fast.bench.quality.metrics.fidelity import NEIGHBOURS, check_count, check_features
from hcma_fast.bench.quality.metrics.judge.count import categories_match, is_clear, outside_windows
from hcma_fast.bench.quality.metrics.judge.model import Judge
from hcma_fast.bench.quality.metrics.likeness.model import LikenessJudge
from hcma_fast.bench.quality.metrics.networks import ClipScorer, FeatureNetwork, cut
from hcma_fast.errors import InputError, UsageError
from hcma_fast.files import write_file
from hcma_fast.train.data.emoji_scenes import CATEGORY_NAMES
from hcma_fast.train.data.image_files import open_image_file

METRICS = ("judge", "likeness", "fid", "kid", "precision-recall", "clip", "detector")
_ON_FEATURES = ("fid", "kid", "precision-recall")
REAL = "real"
"""Folder of the measurements of real images"""


@dataclass(frozen=True)
class Instruments:
    """The networks that look at the images; None for those that are not used."""

    metrics: tuple[str, ...]
    judge: Judge | None = None
    likeness: LikenessJudge | None = None
    features: FeatureNetwork | None = None
    clip: ClipScorer | None = None
    detector: Detector | None = None
    resize_real: bool = False
    left_out: tuple[str, ...] = ()
    """metrics that were asked for, and that need more layouts than there are"""

    def check(self, items: Sequence[EvalItem]) -> None:
        """Refuse what could not be scored, before the first image.

        Raises:
            UsageError: a metric is unknown or lacks its network.
            InputError: too few images for FID, no real images, or phrases without a category.
        """
        for metric in self.metrics:
            if metric not in METRICS:
                raise UsageError(
                    "unknown metric", value=metric, remedy=f"Metrics: {', '.join(METRICS)}."
                )
        wanted = set(self.metrics)
        for metric, network, remedy in (
            ("clip", self.clip, "Name a CLIP model by --clip."),
            ("detector", self.detector, "Name a detector by --detector."),
            *((name, self.features, "Name a vision model by --features.") for name in _ON_FEATURES),
            ("judge", self.judge, "The judge knows EmojiScenes only."),
            ("likeness", self.likeness, "The likeness judge knows EmojiScenes only."),
        ):
            if metric in wanted and network is None:
                raise UsageError(f"{metric} has no network", value=metric, remedy=remedy)
        if wanted & set(_ON_FEATURES):
            if not all(item.has_real for item in items):
                raise InputError(
                    "these metrics compare with real images, and there are none",
                    value=", ".join(name for name in _ON_FEATURES if name in wanted),
                    remedy='Give each line of the manifest an "image", or leave them out.',
                )
            if "fid" in wanted and self.features is not None:
                check_count(len(items), self.features.width)
        if "detector" in wanted and self.detector is not None:
            self.detector.check([item.layout for item in items])
        judges = [name for name in ("judge", "likeness") if name in wanted]
        if judges:
            unknown = {phrase for item in items for phrase in item.layout.phrases}
            for phrase in sorted(unknown - set(CATEGORY_NAMES)):
                raise InputError(
                    "the judge has no category for a phrase",
                    value=phrase,
                    remedy="It knows EmojiScenes' categories only: leave "
                    f"{' and '.join(judges)} out of --metric.",
                )

    def too_few(self, items: Sequence[EvalItem]) -> dict[str, str]:
        """Scores of sets that these layouts are too few for, in words, by metric.

        A metric whose name ends in "of boxes" is left out for boxes alone.
        """
        if self.features is None or not all(item.has_real for item in items):
            return {}
        least = {
            "fid": (self.features.width + 1, f"{self.features.distance} ({self.features.title})"),
            "kid": (2, "KID"),
            "precision-recall": (NEIGHBOURS + 1, "precision and recall"),
        }
        found: dict[str, str] = {}
        boxes = sum(len(item.layout) for item in items)
        for name in (name for name in _ON_FEATURES if name in (*self.metrics, *self.left_out)):
            number, title = least[name]
            if len(items) < number:
                found[name] = f"{title}: it needs {number} images, and there are {len(items)}"
            if boxes < number:
                why = f"{title} of boxes: it needs {number} boxes, and there are {boxes}"
                found[f"{name} of boxes"] = why
        return found

    def without_too_few(self, items: Sequence[EvalItem]) -> Instruments:
        """The same without the metrics that these layouts are too few for.

        Raises:
            InputError: none would be left.
        """
        out = tuple(name for name in self.metrics if name in self.too_few(items))
        kept = tuple(name for name in self.metrics if name not in out)
        if out and not kept:
            raise InputError(
                "no metric that was asked for can be measured on so few layouts",
                value="; ".join(self.too_few(items)[name] for name in out),
                remedy="Use more layouts, or add kid, which works on two.",
            )
        return replace(self, metrics=kept, left_out=out)

    @property
    def titles(self) -> dict[str, str]:
        """What the networks are."""
        named = {"features": self.features, "clip": self.clip, "detector": self.detector}
        titles = {name: network.title for name, network in named.items() if network is not None}
        if self.judge is not None:
            titles["judge"] = f"EmojiScenes judge {self.judge.card.sha256[:12]}"
        if self.likeness is not None:
            card = self.likeness.card
            titles["likeness"] = f"likeness judge {card.sha256[:12]}, threshold {card.threshold:g}"
        return titles

    def digest(self, run: RunSettings) -> str:
        """Tells measurements by these networks of this run from others."""
        content = json.dumps([run.digest, self.titles, self.resize_real], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Measured:
    """One block of images; R is the number of its boxes."""

    whole: NDArray[np.float32]
    """(n, D) features, D = 0 without a feature network"""
    crops: NDArray[np.float32]
    """(R, D)"""
    judged: NDArray[np.bool_]
    """(R,) the judge sees the phrase; empty without a judge, as the next three"""
    log_probability: NDArray[np.float32]
    """(R,) of the phrase, by the judge"""
    counted: NDArray[np.bool_]
    """(n,) the boxes show each category as often as the layout has it"""
    clear: NDArray[np.bool_]
    """(n,) the judge sees no object outside of the boxes"""
    recognised: NDArray[np.bool_]
    """(R,) by the likeness judge; empty without it"""
    clip: NDArray[np.float32]
    """(n,) cosine with the prompt; empty without CLIP, as the next two"""
    clip_label: NDArray[np.float32]
    """(R,) of the box with its phrase"""
    clip_photo: NDArray[np.float32]
    """(R,) with "a photo of a PHRASE" """
    detections: list[list[Detection]]
    """per image; empty without a detector"""

    def to_bytes(self) -> bytes:
        """An npz file without pickles."""
        buffer = io.BytesIO()
        arrays = {name: value for name, value in vars(self).items() if name != "detections"}
        found = json.dumps(self.detections).encode()
        np.savez(buffer, detections=np.frombuffer(found, np.uint8), **arrays)
        return buffer.getvalue()

    @classmethod
    def from_file(cls, path: Path) -> Measured | None:
        """None when there is none, or it cannot be read."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            found = json.loads(arrays.pop("detections").tobytes())
            detections = [
                [Detection(label, score, tuple(box)) for label, score, box in some]
                for some in found
            ]
            return cls(**arrays, detections=detections)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None


def block_file(out: Path, folder: str, digest: str, start: int) -> Path:
    """Where the measurements of the block from item ``start`` lie."""
    return out / "measured" / digest / folder / f"{start:06d}.npz"


def measure(
    instruments: Instruments,
    methods: Sequence[Method],
    items: Sequence[EvalItem],
    run: RunSettings,
    out: Path,
    *,
    shard: Shard = WHOLE,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Measure all blocks of the shard that are not measured yet, and the real images' once.

    Args:
        note: is told what was done to real images to show them.

    Raises:
        InputError: an image is missing, damaged or of another size, or features are not finite.
    """
    digest = instruments.digest(run)
    sets: list[tuple[str, Callable[[EvalItem], Image.Image]]] = []
    changes: Counter[str] = Counter()
    if all(item.has_real for item in items):
        resize = instruments.resize_real

        def open_real(item: EvalItem) -> Image.Image:
            return item.real_image(run.width, run.height, resize=resize, changes=changes)

        sets.append((REAL, open_real))
    for method in methods:
        sets.append((method.folder, _opener(out, method, run)))
    blocks = list(shard.blocks(items))
    for folder, open_image in sets:
        done = 0
        for start, block in blocks:
            path = block_file(out, folder, digest, start)
            if Measured.from_file(path) is None:
                measured = measure_block(
                    instruments, block, [open_image(item) for item in block], folder
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, measured.to_bytes())
            done += len(block)
            if progress is not None:
                progress(folder, done, sum(len(block) for _, block in blocks))
    for change, count in sorted(changes.items()):
        note(f"real images {change}: {count}")


def _opener(out: Path, method: Method, run: RunSettings) -> Callable[[EvalItem], Image.Image]:
    def open_image(item: EvalItem) -> Image.Image:
        path, _ = image_files(out, method, item)
        if finished(out, method, item, run.digest) is None:
            raise InputError(
                f"an image of {method.label} is missing, of another run, or damaged",
                value=str(path),
                remedy="Generate it first: hcma-fast eval --stage generate with the same options.",
            )
        return open_image_file(
            path,
            f"an image of {method.label}",
            size=(run.width, run.height),
            remedy="Delete it and its .json, and generate again.",
        ).image

    return open_image


def measure_block(
    instruments: Instruments, items: Sequence[EvalItem], images: Sequence[Image.Image], what: str
) -> Measured:
    """Everything the instruments say of a block's images.

    Raises:
        InputError: features are not finite.
    """
    nothing = np.zeros(0, np.float32)
    whole = crops = np.zeros((len(items), 0), np.float32)
    judged = counted = clear = recognised = nothing.astype(np.bool_)
    log_probability = clip = clip_label = clip_photo = nothing
    layouts = [item.layout for item in items]
    if instruments.features is not None:
        whole = instruments.features.images(images)
        crops = np.concatenate(
            [
                instruments.features.crops(image, layout.boxes)
                for image, layout in zip(images, layouts, strict=True)
            ]
        )
        check_features(whole, [item.id for item in items], what)
        check_features(crops, [item.id for item in items for _ in item.layout.boxes], what)
    if instruments.judge is not None:
        judge = instruments.judge
        values = judge.log_probabilities(
            np.stack([np.asarray(image) for image in images]),
            [[*layout.boxes, *outside_windows(layout.boxes)] for layout in layouts],
        )
        verdicts = judge.verdicts(values)
        inside = [seen[: len(layout)] for layout, seen in zip(layouts, verdicts, strict=True)]
        outside = [seen[len(layout) :] for layout, seen in zip(layouts, verdicts, strict=True)]
        pairs = list(zip(layouts, inside, strict=True))
        judged = np.array(
            [
                verdict.category == phrase
                for layout, seen in pairs
                for phrase, verdict in zip(layout.phrases, seen, strict=True)
            ],
            np.bool_,
        )
        own = [
            judge.of_categories(some[: len(layout)], layout.phrases)
            for layout, some in zip(layouts, values, strict=True)
        ]
        log_probability = np.concatenate(own).astype(np.float32)
        counted = np.array([categories_match(layout, seen) for layout, seen in pairs], np.bool_)
        clear = np.array([is_clear(seen) for seen in outside], np.bool_)
    if instruments.likeness is not None:
        recognised = np.array(
            [
                verdict
                for image, layout in zip(images, layouts, strict=True)
                for verdict in instruments.likeness.recognised(
                    np.asarray(image), layout.boxes, layout.phrases, edition=1
                )
            ],
            np.bool_,
        )
    if instruments.clip is not None:
        clip = instruments.clip.cosines(images, [item.prompt for item in items])
        pieces = [
            cut(image, box)
            for image, layout in zip(images, layouts, strict=True)
            for box in layout.boxes
        ]
        phrases = [phrase for layout in layouts for phrase in layout.phrases]
        clip_label = instruments.clip.cosines(pieces, phrases)
        clip_photo = instruments.clip.cosines(pieces, [f"a photo of a {p}" for p in phrases])
    detections = []
    if instruments.detector is not None:
        detections = [instruments.detector.detect(image) for image in images]
    return Measured(
        whole=whole,
        crops=crops,
        judged=judged,
        log_probability=log_probability,
        counted=counted,
        clear=clear,
        recognised=recognised,
        clip=clip,
        clip_label=clip_label,
        clip_photo=clip_photo,
        detections=detections,
    )
