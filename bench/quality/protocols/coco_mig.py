"""COCO-MIG, the benchmark of MIGC (Zhou et al. 2024): coloured objects, each in its box.

Layouts come from mig_bench.json (github.com/LeyRio/MIG_Bench) or mig_bench_anno.yaml
(github.com/limuloo/MIGC). The scorer is eval_mig.py of the former, on GroundingDINO and SAM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hcma_fast.bench.quality.generate import RunSettings
from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.methods.table import Method
from hcma_fast.bench.quality.protocols.scorer_files import (
    Scores,
    export_images,
    not_in_format,
    write_document,
)
from hcma_fast.errors import HcmaError, InputError
from hcma_fast.files import read_file
from hcma_fast.layout import Layout

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown")
"""Those that the scorer knows the hues of"""
_LEVELS = range(2, 7)
"""Objects of a layout: its level, L2 to L6"""
_SLACK = 0.01
"""How far a box may leave the image: COCO's do by a fraction of a pixel"""
_REMEDY = "Give mig_bench.json of MIG_Bench or mig_bench_anno.yaml of MIGC, unchanged."
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_PerLevel = Annotated[list[_Share], Field(min_length=len(_LEVELS), max_length=len(_LEVELS))]


class _Record(BaseModel):
    # the files hold more than is used
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Instance(_Record):
    bbox: tuple[float, float, float, float]
    label: str


class _Sample(_Record):
    caption: str
    segment: list[_Instance]


_Samples: TypeAdapter[dict[str, _Sample]] = TypeAdapter(dict[str, _Sample])


class _Metrics(_Record):
    """metric_NAME.json of eval_mig.py, spelled as it is there."""

    sucess_ratio: _Share | None = None
    success_level_ratio: _PerLevel | None = None
    inst_sucess_ratio: _Share | None = None
    inst_level_sucess_ratio: _PerLevel | None = None
    miou: _Share | None = None
    miou_level: _PerLevel | None = None
    clip_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    local_clip_score: Annotated[float, Field(allow_inf_nan=False)] | None = None


class CocoMig:
    """One file of layouts. Make one by :meth:`read`."""

    title = "COCO-MIG"

    def __init__(self, items: Sequence[EvalItem], document: bytes) -> None:
        self.items, self._document = list(items), document

    @classmethod
    def read(cls, path: Path) -> CocoMig:
        """Read all layouts, in the order of their numbers, which become the ids.

        Raises:
            InputError: the file cannot be read or is of another format, a number is there twice,
                or a layout has a colour, a count of objects or a box that the scorer cannot take.
        """
        content = read_file(path, "this file")
        is_yaml = path.suffix.lower() in (".yaml", ".yml")
        raw = _from_yaml(content, path) if is_yaml else _from_json(content, path)
        try:
            samples = _Samples.validate_python(raw)
        except ValidationError as error:
            raise not_in_format(error, "not in COCO-MIG's format", path, _REMEDY) from error
        if not samples:
            raise InputError("COCO-MIG's file has no layout", value=str(path), remedy=_REMEDY)
        for key in samples:
            # eval_mig.py takes what follows the last "_" of a file's name
            if not (key.isascii() and key.isdigit() and len(key) < 19):
                raise InputError("a layout has no number", value=key, remedy=_REMEDY)
        order = sorted(samples, key=int)
        return cls(
            [_item(key, samples[key]) for key in order],
            json.dumps(raw).encode() if is_yaml else content,
        )

    def export(
        self, methods: Sequence[Method], run: RunSettings, out: Path, folder: Path, *, force: bool
    ) -> None:
        """Write ``folder``/METHOD/mig_NUMBER.png and mig_bench.json: eval_mig.py's --image_dir and
        --file_path.

        Args:
            out: folder of the run, whose first ``run.count`` layouts are taken.

        Raises:
            InputError: images are missing. OutputError: ``folder`` has other files.
        """
        export_images(
            methods,
            self.items[: run.count],
            run,
            out,
            lambda method: folder / method.folder,
            lambda item: f"mig_{item.id}.png",
            force=force,
        )
        write_document(folder / "mig_bench.json", self._document, force=force)

    def read_scores(self, path: Path, run: RunSettings) -> Scores:
        """metric_NAME.json of eval_mig.py: success ratios and mean IoU, in all and per level.

        Raises:
            InputError: it cannot be read, is of another format, or has no score.
        """
        content = read_file(path, "this file")
        try:
            found = _Metrics.model_validate_json(content)
        except ValidationError as error:
            remedy = "Give the metric_NAME.json that it writes."
            raise not_in_format(error, "not a file of eval_mig.py", path, remedy) from error
        values: dict[str, float] = {}
        for name, value, levels in (
            ("instance success ratio", found.inst_sucess_ratio, found.inst_level_sucess_ratio),
            ("image success ratio", found.sucess_ratio, found.success_level_ratio),
            ("mIoU", found.miou, found.miou_level),
            ("CLIP score", found.clip_score, None),
            ("local CLIP score", found.local_clip_score, None),
        ):
            if value is not None:
                values[f"COCO-MIG {name}"] = value
            for level, part in zip(_LEVELS, levels or (), strict=False):
                values[f"COCO-MIG {name}, L{level}"] = part
        if not values:
            raise InputError(
                "this file has none of eval_mig.py's scores",
                value=str(path),
                remedy="Run it with --need_miou_score --need_instance_sucess_ratio.",
            )
        return Scores(values, f"{path.name} {hashlib.sha256(content).hexdigest()[:12]}")


def _from_json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"COCO-MIG's file is no JSON: {error}", value=str(path), remedy=_REMEDY
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two equal keys json would drop one without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError("a number or key is there twice", value=twice, remedy=_REMEDY)
    return found


def _from_yaml(content: bytes, path: Path) -> dict[str, Any]:
    """{caption: {phrase: boxes, coco_id: number}} as the JSON has it."""
    try:
        # libyaml where there is one: ten times as fast, and as safe
        loaded = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        samples: dict[str, Any] = {}
        for caption, record in loaded.items():
            key = str(record["coco_id"])
            if key in samples:
                raise InputError("a coco_id is there twice", value=key, remedy=_REMEDY)
            segment = [
                {"bbox": box, "label": phrase}
                for phrase, boxes in record.items()
                if phrase != "coco_id"
                for box in boxes
            ]
            samples[key] = {"caption": caption, "segment": segment}
    except InputError:
        raise
    except (
        yaml.YAMLError,
        RecursionError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(
            f"COCO-MIG's file is not as MIGC writes it: {(str(error).splitlines() or [''])[0]}",
            value=str(path),
            remedy=_REMEDY,
        ) from error
    return samples


def _item(key: str, sample: _Sample) -> EvalItem:
    if len(sample.segment) not in _LEVELS:
        raise InputError(
            f"layout {key} has not 2 to 6 objects, as the scorer's levels have",
            value=len(sample.segment),
            remedy=_REMEDY,
        )
    for instance in sample.segment:
        words = instance.label.split(" ")
        if len(words) < 3 or words[1] not in COLOURS:
            raise InputError(
                f'layout {key}: a label reads "a COLOUR OBJECT", of {", ".join(COLOURS)}',
                value=instance.label,
                remedy=_REMEDY,
            )
    try:
        layout = Layout(
            [instance.label for instance in sample.segment],
            [[_inside(v) for v in instance.bbox] for instance in sample.segment],
        )
    except HcmaError as error:
        raise InputError(
            f"layout {key}: {error.what}", value=error.value, remedy=_REMEDY
        ) from error
    if not sample.caption.strip():
        raise InputError(f"layout {key} has no caption", value=sample.caption, remedy=_REMEDY)
    return EvalItem(id=key, prompt=sample.caption.strip(), layout=layout)


def _inside(value: float) -> float:
    """A coordinate that is out by rounding, moved to the edge; Layout refuses the others."""
    return min(max(value, 0.0), 1.0) if -_SLACK <= value <= 1 + _SLACK else value
