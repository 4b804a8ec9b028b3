"""Do a detector's boxes agree with the layout? AP by faster-coco-eval, mean IoU, counts."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from hcma_fast.bench.quality.metrics.pretrained import load_pretrained
from hcma_fast.errors import InputError
from hcma_fast.layout import Box, Layout

CONFIDENCE = 0.3
"""Least score of a detection that counts for mean IoU and counts; AP has all of them"""
_LEAST = 0.01


class Detection(NamedTuple):
    """One found object."""

    label: str
    score: float
    box: Box


class Detector:
    """An object detector of transformers (DETR, YOLOS, ...), by folder or hub id."""

    def __init__(self, name: str) -> None:
        """Load it, safetensors only.

        Raises:
            WeightsError: it does not load.
        """
        # seconds of imports, for those who use it
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self._model: Any = load_pretrained(AutoModelForObjectDetection, name)
        self._processor: Any = load_pretrained(AutoImageProcessor, name)
        self.title = f"detector {Path(name).name}"
        self.labels: dict[int, str] = {
            int(index): label.lower() for index, label in self._model.config.id2label.items()
        }

    def check(self, layouts: Sequence[Layout]) -> None:
        """Refuse layouts with phrases that it has no category for.

        Raises:
            InputError.
        """
        known = set(self.labels.values())
        for layout in layouts:
            for phrase in layout.phrases:
                if phrase.lower() not in known:
                    raise InputError(
                        "the detector has no category for a phrase",
                        value=phrase,
                        remedy="Use a detector of these categories, or leave out detector metrics.",
                    )

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Detection]:
        """What it finds, boxes xyxy in [0, 1], clipped to the image."""
        inputs = self._processor(images=image, return_tensors="pt")
        output = self._model(**inputs)
        found = self._processor.post_process_object_detection(
            output, threshold=_LEAST, target_sizes=[(1.0, 1.0)]
        )[0]
        boxes = found["boxes"].clamp(0, 1).tolist()
        return [
            Detection(self.labels[label], score, (x0, y0, x1, y1))
            for label, score, (x0, y0, x1, y1) in zip(
                found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True
            )
        ]


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0 for boxes without area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / both if both > 0 else 0.0


def best_ious(layout: Layout, found: Sequence[Detection]) -> list[float]:
    """Per box the best IoU with a confident detection of its category; 0 where there is none."""
    return [
        max(
            (
                iou(box, item.box)
                for item in found
                if item.score >= CONFIDENCE and item.label == phrase.lower()
            ),
            default=0.0,
        )
        for phrase, box in zip(layout.phrases, layout.boxes, strict=True)
    ]


def counts_match(layout: Layout, found: Sequence[Detection]) -> bool:
    """Are there as many confident detections of each category as the layout asks for?"""
    wanted = Counter(phrase.lower() for phrase in layout.phrases)
    seen = Counter(item.label for item in found if item.score >= CONFIDENCE)
    return all(seen[name] == count for name, count in wanted.items())


def layout_ap(
    layouts: Sequence[Layout], found: Sequence[Sequence[Detection]]
) -> tuple[float, float]:
    """COCO's AP (mean over IoU 0.50 to 0.95) and AP50 with the layouts as ground truth.

    Detections of categories that no layout asks for do not count. NaN without any box.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    names = sorted({phrase.lower() for layout in layouts for phrase in layout.phrases})
    if not names:
        return float("nan"), float("nan")
    # COCO's small, medium and large are pixels: shares are taken as those of a 512 pixel image
    side = 512.0
    truth: dict[str, Any] = {
        "images": [{"id": i, "width": side, "height": side} for i in range(1, len(layouts) + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        "annotations": [],
    }
    results = []
    for index, (layout, some) in enumerate(zip(layouts, found, strict=True), 1):
        for phrase, box in zip(layout.phrases, layout.boxes, strict=True):
            bbox = _xywh(box, side)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": index,
                    "category_id": names.index(phrase.lower()) + 1,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": 0,
                }
            )
        results += [
            {
                "image_id": index,
                "category_id": names.index(item.label) + 1,
                "bbox": _xywh(item.box, side),
                "score": item.score,
            }
            for item in some
            if item.label in names
        ]
    if not results:
        return 0.0, 0.0
    # it prints its progress
    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(truth)
        judged = COCOeval_faster(expected, expected.loadRes(results), iouType="bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return float(np.asarray(judged.stats)[0]), float(np.asarray(judged.stats)[1])


def _xywh(box: Box, side: float) -> list[float]:
    return [box[0] * side, box[1] * side, (box[2] - box[0]) * side, (box[3] - box[1]) * side]
