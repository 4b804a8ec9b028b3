"""COCO-MIG: layouts in both of its files' formats, images for its scorer, and scores back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hcma_fast.bench.quality.generate import RunSettings
from hcma_fast.bench.quality.items import EvalItem
from hcma_fast.bench.quality.methods.table import Method
from hcma_fast.bench.quality.protocols.coco_mig import COLOURS, CocoMig
from hcma_fast.bench.quality.protocols.scorer_files import export_folder, split_scores
from hcma_fast.errors import HcmaError, InputError, OutputError, UsageError

#: as mig_bench_sample.py writes it, the blank at the end of a caption included
SAMPLES: dict[str, Any] = {
    "0": {
        "caption": "a photo of a blue fork and a green carrot ",
        "segment": [
            {"bbox": [0.1, 0.2, 0.5, 0.75], "label": "a blue fork"},
            {"bbox": [0.5, 0.25, 1.0000000000000002, 0.9], "label": "a green carrot"},
        ],
        "image_id": "391895",
    },
    "12": {
        "caption": "a photo of a red teddy bear and a red teddy bear and a white cup ",
        "segment": [
            {"bbox": [0.0, 0.0, 0.5, 0.5], "label": "a red teddy bear"},
            {"bbox": [0.5, 0.5, 1.0, 1.0], "label": "a red teddy bear"},
            {"bbox": [0.25, 0.25, 0.75, 0.5], "label": "a white cup"},
        ],
        "image_id": "9",
    },
}
#: lines of MIGC's mig_bench_anno.yaml, its folded keys included
YAML = """\
a photo of a black airplane and a black airplane:
  a black airplane:
  - - 0.390109375
    - 0.27538823529411766
    - 1.0
    - 0.6890352941176471
  - - 0.412890625
    - 0.38329411764705884
    - 0.682984375
    - 0.5439058823529412
  coco_id: '6'
? a photo of a black bed and a black teddy bear and a green teddy bear and a green
  teddy bear
: a black bed:
  - - 0.0
    - 0.1
    - 0.9
    - 0.95
  a black teddy bear:
  - - 0.1
    - 0.2
    - 0.4
    - 0.5
  a green teddy bear:
  - - 0.5
    - 0.2
    - 0.7
    - 0.5
  - - 0.7
    - 0.2
    - 0.9
    - 0.5
  coco_id: '3'
"""
#: as eval_mig.py writes it
METRIC: dict[str, Any] = {
    "inst_sucess_ratio": 0.5,
    "inst_level_sucess_ratio": [0.6, 0.5, 0.4, 0.3, 0.2],
    "miou": 0.43,
    "miou_level": [0.5, 0.4, 0.3, 0.2, 0.1],
    "metric_name": "eval",
    "image_path": "/images/hcma",
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_reads_the_scorers_json(tmp_path: Path) -> None:
    items = CocoMig.read(write(tmp_path / "mig_bench.json", SAMPLES)).items
    assert [item.id for item in items] == ["0", "12"]
    assert items[0].prompt == "a photo of a blue fork and a green carrot"
    assert items[0].layout.phrases == ("a blue fork", "a green carrot")
    # COCO's boxes leave the image by rounding
    assert items[0].layout.boxes[1] == (0.5, 0.25, 1.0, 0.9)
    assert len(items[1].layout) == 3 and not items[0].has_real


def test_reads_migcs_yaml_and_writes_the_json_that_the_scorer_needs(
    tmp_path: Path, run_of: Callable[[int], RunSettings]
) -> None:
    benchmark = CocoMig.read(write(tmp_path / "mig_bench_anno.yaml", YAML))
    assert [item.id for item in benchmark.items] == ["3", "6"]
    first, second = benchmark.items
    assert first.prompt.endswith("and a green teddy bear")
    assert first.layout.phrases.count("a green teddy bear") == 2
    assert second.layout.boxes[1][0] == 0.412890625
    benchmark.export([], run_of(2), tmp_path, tmp_path / "export", force=False)
    written = tmp_path / "export" / "mig_bench.json"
    assert CocoMig.read(written).items == benchmark.items


_low, _side = st.floats(0, 0.75), st.floats(0.125, 0.25)
_box = st.builds(lambda x, y, w, h: [x, y, x + w, y + h], _low, _low, _side, _side)
_instance = st.fixed_dictionaries(
    {
        "bbox": _box,
        "label": st.tuples(
            st.sampled_from(COLOURS), st.sampled_from(["car", "teddy bear", "tv"])
        ).map(lambda pair: f"a {pair[0]} {pair[1]}"),
    }
)


@given(
    st.dictionaries(
        st.integers(0, 999).map(str),
        st.lists(_instance, min_size=2, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_both_formats_hold_the_same_layouts(
    tmp_path_factory: pytest.TempPathFactory, layouts: dict[str, list[Any]]
) -> None:
    folder = tmp_path_factory.mktemp("mig")
    samples = {
        key: {"caption": f"a photo {key}", "segment": segment} for key, segment in layouts.items()
    }
    anno: dict[str, Any] = {}
    for key, segment in layouts.items():
        record: dict[str, Any] = {}
        for instance in segment:
            record.setdefault(instance["label"], []).append(instance["bbox"])
        anno[f"a photo {key}"] = {**record, "coco_id": key}
    as_json = CocoMig.read(write(folder / "a.json", samples)).items
    as_yaml = CocoMig.read(write(folder / "a.yaml", yaml.safe_dump(anno))).items

    # the YAML has boxes by their phrase, so only their order may differ
    def content(item: EvalItem) -> tuple[str, str, list[Any]]:
        pairs = zip(item.layout.phrases, item.layout.boxes, strict=True)
        return item.id, item.prompt, sorted(pairs)

    assert [content(item) for item in as_json] == [content(item) for item in as_yaml]
    assert [int(item.id) for item in as_json] == sorted(map(int, layouts))


@given(st.binary(max_size=60), st.sampled_from(["a.json", "a.yaml"]))
def test_whatever_the_file_holds_the_error_is_typed(
    tmp_path_factory: pytest.TempPathFactory,
    run_of: Callable[[int], RunSettings],
    content: bytes,
    name: str,
) -> None:
    path = tmp_path_factory.mktemp("mig") / name
    path.write_bytes(content)
    for read in (lambda: CocoMig.read(path), lambda: CocoMig([], b"").read_scores(path, run_of(2))):
        with pytest.raises(HcmaError):
            read()


def changed(**changes: Any) -> dict[str, Any]:
    return {"0": {**SAMPLES["0"], **changes}}


ONE = SAMPLES["0"]["segment"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no layout"),
        ([], "not in COCO-MIG's format"),
        ({"0": {"caption": "a photo"}}, "segment"),
        ({"x_1": SAMPLES["0"]}, "no number"),
        (changed(segment=ONE[:1]), "2 to 6 objects"),
        (changed(segment=ONE * 4), "2 to 6 objects"),
        (changed(segment=[ONE[0], {**ONE[1], "label": "a pink car"}]), "COLOUR OBJECT"),
        (changed(segment=[ONE[0], {**ONE[1], "bbox": [0, 0, 1.2, 1]}]), "layout 0: box"),
        (changed(segment=[ONE[0], {**ONE[1], "bbox": [0.5, 0, 0.5, 1]}]), "layout 0: box"),
        (changed(caption=" "), "no caption"),
        (f'{{"0": {json.dumps(SAMPLES["0"])}, "0": {json.dumps(SAMPLES["12"])}}}', "twice"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CocoMig.read(write(tmp_path / "mig_bench.json", content))
    with pytest.raises(InputError, match="cannot read"):
        CocoMig.read(tmp_path / "missing.json")


def test_reads_the_scorers_result(tmp_path: Path, run_of: Callable[[int], RunSettings]) -> None:
    found = CocoMig([], b"").read_scores(write(tmp_path / "metric_eval.json", METRIC), run_of(2))
    assert found.values["COCO-MIG instance success ratio"] == 0.5
    assert found.values["COCO-MIG mIoU, L6"] == 0.1
    assert len(found.values) == 12 and found.source.startswith("metric_eval.json ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"miou": 1.5}, "miou"),
        ({"miou_level": [0.5]}, "miou_level"),
        ({"inst_sucess_ratio": float("nan")}, "inst_sucess_ratio"),
        ({"inst_sucess_ratio": "half"}, "inst_sucess_ratio"),
    ],
)
def test_a_bad_result_names_the_field(
    tmp_path: Path, run_of: Callable[[int], RunSettings], change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "metric.json", {**METRIC, **change})
    with pytest.raises(InputError, match=message):
        CocoMig([], b"").read_scores(path, run_of(2))
    empty = write(tmp_path / "metric.json", {"metric_name": "eval"})
    with pytest.raises(InputError, match=r"none of eval_mig\.py's scores"):
        CocoMig([], b"").read_scores(empty, run_of(2))


def test_a_label_with_settings_takes_its_own_file() -> None:
    methods = [Method.parse("hcma"), Method.parse("hcma:eta0=1")]
    assert split_scores("hcma:eta0=1=a=b.json", methods) == ("hcma:eta0=1", Path("a=b.json"))
    assert split_scores("hcma=m.json", methods) == ("hcma", Path("m.json"))
    for text in ("hcma", "hcma=", "gligen=m.json"):
        with pytest.raises(UsageError, match="METHOD=FILE"):
            split_scores(text, methods)


def test_an_exported_folder_holds_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "hcma"

    def export(content: bytes, *, force: bool = False) -> None:
        export_folder(folder, {"mig_1.png": content, "mig_2.png": b"2"}, bytes, force=force)

    export(b"1")
    # one that was stopped goes on
    (folder / "mig_2.png").unlink()
    export(b"1")
    with pytest.raises(OutputError, match="another run"):
        export(b"other")
    export(b"other", force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "mig_1.png": b"other",
        "mig_2.png": b"2",
    }
    (folder / "mig_3.png").touch()
    with pytest.raises(OutputError, match="not of this run"):
        export(b"other", force=True)
