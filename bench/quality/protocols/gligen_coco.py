"""GLIGEN's protocol on COCO (Li et al. 2023, section 5.1): captions with boxes, FID and AP.

After its published code: the square in the middle of an image, boxes of at least 1% of it, the 8
largest; images named by COCO's id, generated ones in ``fake``, real ones in ``real``. Its authors
score by pytorch-fid and pytorch-YOLOv4 (github.com/gligen/GLIGEN, issue 28).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hcma_fast.bench.quality.generate import RunSettings, png_bytes
from hcma_fast.bench.quality.items import COCO_COUNT, EvalItem, check_enough, check_items
from hcma_fast.bench.quality.methods.table import Method
from hcma_fast.bench.quality.metrics.detection import Detection, layout_ap
from hcma_fast.bench.quality.protocols.scorer_files import (
    Scores,
    export_folder,
    export_images,
    not_in_format,
    write_document,
)
from hcma_fast.errors import InputError
from hcma_fast.files import read_file
from hcma_fast.layout import Layout
from hcma_fast.train.data.coco import annotation_files, read_categories, read_split
from hcma_fast.train.data.coco_records import BadRecord
from hcma_fast.train.data.views import MIN_AREA, crop_layout

MAX_BOXES = 8
_SPLITS = ("val2014", "val2017")
_FID = re.compile(rb"^FID:\s*(\S+)\s*$", re.MULTILINE)
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Found(BaseModel):
    """An entry of COCO's results format."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    image_id: int
    category_id: int
    bbox: tuple[_Finite, _Finite, _Finite, _Finite]
    score: Annotated[float, Field(ge=0, le=1)]


_Results: TypeAdapter[list[_Found]] = TypeAdapter(list[_Found])


class GligenCoco:
    """A validation split. Make one by :meth:`read`."""

    def __init__(self, items: Sequence[EvalItem], categories: dict[int, str], split: str) -> None:
        self.items, self._categories = list(items), categories
        self.title = f"GLIGEN's protocol on COCO {split}"

    @classmethod
    def read(
        cls,
        folder: Path,
        count: int | None,
        *,
        skipped: list[BadRecord] | None = None,
        image_root: Path | None = None,
    ) -> GligenCoco:
        """The first ``count`` images of val2014 or val2017 (default: 30,000, or all where fewer).

        Crowds have no box here, GLIGEN's code gives them one.

        Args:
            folder: with val2014/ or val2017/ and annotations/, as COCO's archives unpack.
            skipped, image_root: as in :func:`read_coco`.

        Raises:
            InputError: files are missing or malformed, or there are fewer images.
        """
        split = next((name for name in _SPLITS if (folder / name).is_dir()), None)
        if split is None:
            raise InputError(
                "this folder has neither val2014 nor val2017",
                value=str(folder),
                remedy="Unpack COCO's images and annotations there.",
            )
        examples = read_split(folder, split, skipped=skipped, image_root=image_root)
        check_enough(len(examples), count or 0)
        items = [
            EvalItem(
                id=str(example.image_id),
                prompt=example.captions[0],
                layout=_largest(crop_layout(example.layout, example.width, example.height, 0.0)),
                image=example.path,
                image_size=(example.width, example.height),
                crop=True,
            )
            for example in examples[: count or COCO_COUNT]
        ]
        check_items(items)
        instances, _ = annotation_files(folder, split)
        names = read_categories(instances, skip_bad=skipped is not None)
        return cls(items, names, split)

    def export(
        self, methods: Sequence[Method], run: RunSettings, out: Path, folder: Path, *, force: bool
    ) -> None:
        """Write ``folder``/METHOD/fake/ID.png, real/ID.png and instances_fake.json, which has the
        layouts as COCO's annotations of the generated images.

        Args:
            out: folder of the run, whose first ``run.count`` layouts are taken.

        Raises:
            InputError: images are missing. OutputError: ``folder`` has other files.
        """
        items = self.items[: run.count]
        export_images(
            methods,
            items,
            run,
            out,
            lambda method: folder / method.folder / "fake",
            lambda item: f"{item.id}.png",
            force=force,
        )
        export_folder(
            folder / "real",
            {f"{item.id}.png": item for item in items},
            lambda item: png_bytes(item.real_image(run.width, run.height, resize=False)),
            force=force,
        )
        content = json.dumps(self.annotations(run)).encode()
        write_document(folder / "instances_fake.json", content, force=force)

    def annotations(self, run: RunSettings) -> dict[str, Any]:
        """The layouts in COCO's annotation format, in pixels of the generated images."""
        numbers = {name: number for number, name in self._categories.items()}
        items = self.items[: run.count]
        boxes = [
            (int(item.id), numbers[phrase], _pixels(box, run))
            for item in items
            for phrase, box in zip(item.layout.phrases, item.layout.boxes, strict=True)
        ]
        return {
            "info": {"description": f"{self.title}, layouts of generated images"},
            "images": [
                {
                    "id": int(item.id),
                    "file_name": f"{item.id}.png",
                    "width": run.width,
                    "height": run.height,
                }
                for item in items
            ],
            "categories": [{"id": n, "name": name} for n, name in self._categories.items()],
            "annotations": [
                {
                    "id": index,
                    "image_id": image,
                    "category_id": category,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": 0,
                }
                for index, (image, category, bbox) in enumerate(boxes, 1)
            ],
        }

    def read_scores(self, path: Path, run: RunSettings) -> Scores:
        """A detector's results on ``fake`` in COCO's format (AP), or what pytorch-fid printed.

        Raises:
            InputError: neither, or results of other images or categories.
        """
        content = read_file(path, "this file")
        source = f"{path.name} {hashlib.sha256(content).hexdigest()[:12]}"
        if printed := _FID.search(content):
            return Scores({"FID (pytorch-fid)": _fid(printed[1], path)}, source)
        try:
            found = _Results.validate_json(content)
        except ValidationError as error:
            what = "neither COCO results nor pytorch-fid's output"
            remedy = (
                "Give a list of image_id, category_id, bbox (x, y, width, height in pixels) and "
                'score, or a file with the line "FID: ...".'
            )
            raise not_in_format(error, what, path, remedy) from error
        ap, ap50 = layout_ap(*self._detections(found, run, path))
        return Scores({"AP (COCO results)": ap, "AP50 (COCO results)": ap50}, source)

    def _detections(
        self, found: Sequence[_Found], run: RunSettings, path: Path
    ) -> tuple[list[Layout], list[list[Detection]]]:
        items = self.items[: run.count]
        places = {int(item.id): index for index, item in enumerate(items)}
        seen: list[list[Detection]] = [[] for _ in items]
        for entry in found:
            for what, key, known in (
                ("image_id", entry.image_id, places),
                ("category_id", entry.category_id, self._categories),
            ):
                if key not in known:
                    raise InputError(
                        f"{path.name}: an {what} is not of this run"
                        if what == "image_id"
                        else f"{path.name}: a {what} is not one of COCO's",
                        value=key,
                        remedy="Detect on the images that --export wrote, and write COCO's ids.",
                    )
            x, y, width, height = entry.bbox
            box = (
                x / run.width,
                y / run.height,
                (x + width) / run.width,
                (y + height) / run.height,
            )
            name = self._categories[entry.category_id].lower()
            seen[places[entry.image_id]].append(Detection(name, entry.score, box))
        return [item.layout for item in items], seen


def _largest(layout: Layout) -> Layout:
    """The 8 largest boxes of at least 1% of the image."""
    pairs = [
        (phrase, box)
        for phrase, box in zip(layout.phrases, layout.boxes, strict=True)
        if _area(box) >= MIN_AREA
    ]
    pairs = sorted(pairs, key=lambda pair: -_area(pair[1]))[:MAX_BOXES]
    return Layout([phrase for phrase, _ in pairs], [box for _, box in pairs])


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _pixels(box: Sequence[float], run: RunSettings) -> list[float]:
    """x, y, width, height."""
    left, top = box[0] * run.width, box[1] * run.height
    return [left, top, box[2] * run.width - left, box[3] * run.height - top]


def _fid(text: bytes, path: Path) -> float:
    try:
        value = float(text)
        if math.isfinite(value):
            return value
    except ValueError:
        pass
    raise InputError(
        "pytorch-fid's output has no finite number",
        value=(str(path), text.decode(errors="replace")[:40]),
        remedy="Run it again, and look at its messages.",
    )
