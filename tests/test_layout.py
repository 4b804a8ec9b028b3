"""Layout: what it accepts, what it refuses and with which words, and its converters."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hcma_fast.config import MAX_OBJECTS
from hcma_fast.errors import InputError, OutputError
from hcma_fast.layout import Box, BoxNotation, Layout

#: a busy machine is no fault of the code
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

WHOLE = (0.0, 0.0, 1.0, 1.0)
COCO = {1: "person", 18: "dog"}


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    def span() -> tuple[float, float]:
        low, high = sorted(draw(st.tuples(unit, unit)))
        # neighbours in float64 may be one number in float32, and so an empty box
        return (low, high) if np.float32(low) < np.float32(high) else (0.0, 1.0)

    unit = st.floats(0, 1)
    (x0, x1), (y0, y1) = span(), span()
    return x0, y0, x1, y1


#: any Unicode text that is not blank; colons, commas and quotes come often
phrases = st.text(
    st.one_of(st.sampled_from(':,"{}\\ é犬🐶'), st.characters(codec="utf-8")),
    min_size=1,
    max_size=20,
).filter(lambda text: text.strip() != "")
layouts = st.lists(st.tuples(phrases, boxes()), max_size=MAX_OBJECTS).map(
    lambda pairs: Layout([p for p, _ in pairs], [b for _, b in pairs])
)


def refused(problem: str, *args: Any, make: Any = Layout) -> InputError:
    """The error that ``make(*args)`` raises: it says ``problem``, shows a value, has a remedy."""
    with pytest.raises(InputError, match=problem) as caught:
        make(*args)
    error = caught.value
    assert error.value is not None
    # a long value is cut
    assert repr(error.value)[:90] in str(error)
    assert len(error.remedy) > 10 and str(error).endswith(error.remedy)
    assert error.exit_code == 3
    return error


@untimed
@given(layouts)
def test_json_round_trip(layout: Layout) -> None:
    assert Layout.from_json(layout.to_json()) == layout
    assert Layout.from_json(layout.to_json().encode()) == layout
    assert json.loads(layout.to_json())["phrases"] == list(layout.phrases)


@untimed
@given(phrases, boxes())
def test_parse_box_takes_any_phrase(phrase: str, box: Box) -> None:
    text = f"{phrase}:{','.join(repr(v) for v in box)}"
    assert Layout.parse_box(text) == (phrase.strip(), box)


@pytest.mark.parametrize(
    "text",
    ["", "dog", "dog:", "dog:1,2,3", "dog:0,0,1,1,1", "dog:a,b,c,d", "0,0,1,1", "dog:0;0;1;1"],
)
def test_parse_box_refuses(text: str) -> None:
    assert refused("PHRASE:X0,Y0,X1,Y1", text, make=Layout.parse_box).value == text


def test_parse_box_checks_box_and_phrase() -> None:
    refused("is inverted", "dog:0.5,0,0.1,1", make=Layout.parse_box)
    refused("not finite", "dog:0,0,nan,1", make=Layout.parse_box)
    refused("blank", " :0,0,1,1", make=Layout.parse_box)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ((0, 0, math.nan, 1), "not finite"),
        ((0, -math.inf, 1, 1), "not finite"),
        ((-0.01, 0, 1, 1), "leaves the image"),
        ((0, 0, 64, 64), "leaves the image"),
        ((0.6, 0, 0.2, 1), "is inverted"),
        ((0, 0.6, 1, 0.2), "is inverted"),
        ((0.5, 0, 0.5, 1), "is empty"),
        ((0, 0.5, 1, 0.5), "is empty"),
        ((0.5, 0, 0.5 + 1e-12, 1), "is empty"),
    ],
)
def test_wrong_boxes(box: Box, problem: str) -> None:
    error = refused(f"box 1 .*{problem}", ["cat", "dog"], [WHOLE, box])
    assert str(error.value) == str(tuple(float(v) for v in box))


@pytest.mark.parametrize(
    "box",
    [
        *([0, 0, 1], [0, 0, 1, 1, 1], [], "0011", ["0", "0", "1", "1"]),
        *([0, 0, 1, None], [0, 0, 1, True], [0, 0, 1, 10**400], [0, 0, 1, 1j], [0, 0, 1, [1]]),
    ],
    ids=repr,
)
def test_boxes_are_four_numbers(box: Any) -> None:
    refused("box 0 is not four numbers", ["dog"], [box])
    refused("box 0 is not four numbers", ["dog"], [box], make=Layout.from_xywh)
    refused("box 0 is not four numbers", ["dog"], [box], 64, 64, make=Layout.from_pixels)


@pytest.mark.parametrize(
    ("names", "rows", "problem"),
    [
        ("dog", [WHOLE], "phrases must be a list"),
        ([3], [WHOLE], "valid string"),
        ([b"dog"], [WHOLE], "valid string"),
        (3, [WHOLE], "phrases"),
        ([" \t\n"], [WHOLE], "phrase 0 is blank"),
        ([""], [WHOLE], "phrase 0 is blank"),
        (["\ud83d"], [WHOLE], "surrogate"),
        (["dog"], 3, "boxes must be a list"),
        (["dog"], WHOLE, "boxes must be a list"),
        (["dog"], [], "counts of phrases and boxes"),
        ([], [WHOLE], "counts of phrases and boxes"),
        (["dog"] * 31, [WHOLE] * 31, "at most 30"),
        (["dog " * 76], [WHOLE], "more words"),
    ],
)
def test_wrong_lists(names: Any, rows: Any, problem: str) -> None:
    refused(problem, names, rows)


def test_limits_are_inclusive() -> None:
    assert len(Layout(["dog"] * MAX_OBJECTS, [WHOLE] * MAX_OBJECTS)) == MAX_OBJECTS
    assert len(Layout(["dog " * 75], [WHOLE])) == 1
    assert len(Layout.empty()) == 0


def test_takes_arrays_and_generators() -> None:
    array = np.array([[0, 0.25, 0.5, 1]], dtype=np.float32)
    expected = Layout(["dog"], [(0.0, 0.25, 0.5, 1.0)])
    assert Layout((name for name in ["dog"]), array) == expected
    assert Layout(["dog"], (iter(row) for row in array)) == expected  # type: ignore[misc]
    assert all(type(v) is float for v in expected.boxes[0])


def test_immutable_and_hashable() -> None:
    names, rows = ["dog"], [[0, 0, 1, 1]]
    layout = Layout(names, rows)
    names.append("cat")
    rows[0][0] = 9
    assert layout == Layout(["dog"], [WHOLE]) and hash(layout) == hash(Layout(["dog"], [WHOLE]))
    with pytest.raises(ValidationError, match="frozen"):
        layout.phrases = ("cat",)  # type: ignore[misc]
    assert isinstance(layout.phrases, tuple) and isinstance(layout.boxes[0], tuple)


@untimed
@given(layouts)
def test_padded(layout: Layout) -> None:
    array, mask = layout.padded()
    count = len(layout)
    assert array.shape == (MAX_OBJECTS, 4) and mask.shape == (MAX_OBJECTS,)
    assert array.dtype == mask.dtype == np.float32
    assert mask.tolist() == [1.0] * count + [0.0] * (MAX_OBJECTS - count)
    assert not array[count:].any()
    assert (array[:count, 2:] > array[:count, :2]).all()
    np.testing.assert_allclose(array[:count], np.array(layout.boxes).reshape(-1, 4), atol=1e-7)


def test_from_xywh_and_pixels() -> None:
    expected = Layout(["dog"], [[0.25, 0.5, 0.75, 1.0]])
    assert Layout.from_xywh(["dog"], [[0.25, 0.5, 0.5, 0.5]]) == expected
    assert Layout.from_pixels(["dog"], [[160, 240, 480, 480]], 640, 480) == expected
    refused("leaves the image", ["dog"], [[0.5, 0, 0.6, 1]], make=Layout.from_xywh)
    refused("is inverted", ["dog"], [[0.5, 0, -0.1, 1]], make=Layout.from_xywh)
    refused("leaves the image", ["dog"], [[0, 0, 641, 480]], 640, 480, make=Layout.from_pixels)
    for size in ((0, 480), (640, -1), (math.nan, 480), (640, math.inf)):
        refused("image size", ["dog"], [[0, 0, 1, 1]], *size, make=Layout.from_pixels)


def annotation(bbox: Any, category: int = 18, crowd: int = 0) -> dict[str, Any]:
    return {"bbox": bbox, "category_id": category, "iscrowd": crowd, "segmentation": [[1, 2]]}


def test_from_coco_clips_skips_crowds_and_sorts_by_size() -> None:
    annotations = [
        annotation([10, 10, 10, 20]),
        annotation([0, 0, 100, 50], crowd=1),
        annotation([-10, 25, 60, 1000], category=1),
        annotation([100, 0, 20, 20]),
        annotation([5, 5, 0, 10]),
        annotation([99.9999999999, 0, 20, 20]),
    ]
    before = copy.deepcopy(annotations)
    layout = Layout.from_coco(annotations, COCO, 100, 50)
    assert annotations == before
    # outside, without width, and without width once clipped: dropped
    assert layout == Layout(["person", "dog"], [[0, 0.5, 0.5, 1], [0.1, 0.2, 0.2, 0.6]])
    assert Layout.from_coco([], COCO, 100, 50) == Layout.empty()


def test_from_coco_keeps_the_largest_thirty() -> None:
    sides = [(7 * k) % 40 + 1 for k in range(40)]
    layout = Layout.from_coco([annotation([0, 0, s, s]) for s in sides], COCO, 64, 64)
    widths = [round(box[2] * 64) for box in layout.boxes]
    assert widths == sorted(sides, reverse=True)[:MAX_OBJECTS]


@pytest.mark.parametrize(
    "wrong",
    [
        annotation([0, 0, 9, 9], category=99),
        annotation([0, 0, 9]),
        annotation("0099"),
        annotation(["0", "0", "9", "9"]),
        annotation([0, 0, math.nan, 9]),
        annotation(None),
        {"category_id": 18},
        {"bbox": [0, 0, 9, 9]},
    ],
)
def test_from_coco_refuses(wrong: dict[str, Any]) -> None:
    error = refused("malformed COCO", [wrong], COCO, 64, 64, make=Layout.from_coco)
    assert repr(error.value) == repr(wrong)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must be JSON"),
        ("{", "must be JSON"),
        (b"\xff\xfe", "UTF-16"),
        ("[" * 100_000, "nests more than 64 levels"),
        ("[]", "exactly the keys"),
        ('{"phrases": []}', "exactly the keys"),
        ('{"phrases": [], "boxes": [], "seed": 1}', "exactly the keys"),
        ('{"phrases": "dog", "boxes": [[0, 0, 1, 1]]}', "must be lists"),
        ('{"phrases": ["dog"], "boxes": {"0": 1}}', "must be lists"),
        ('{"phrases": ["dog"], "boxes": [[0, 0, NaN, 1]]}', "not finite"),
        ('{"phrases": ["dog"], "boxes": [[0, 0, 1e999, 1]]}', "not finite"),
        ('{"phrases": ["\\ud800"], "boxes": [[0, 0, 1, 1]]}', "surrogate"),
    ],
)
def test_from_json_refuses(text: str | bytes, problem: str) -> None:
    refused(problem, text, make=Layout.from_json)


def test_files(tmp_path: Path) -> None:
    path, layout = tmp_path / "größe.json", Layout(["犬 🐶"], [WHOLE])
    path.write_text("old")
    layout.to_file(path)
    assert Layout.from_file(path) == Layout.from_file(str(path)) == layout
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    refused("cannot read", tmp_path / "missing.json", make=Layout.from_file)
    refused("cannot read", tmp_path, make=Layout.from_file)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, layout = tmp_path / "layout.json", Layout(["dog"], [WHOLE])
    layout.to_file(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        Layout.empty().to_file(path)
    assert caught.value.value == str(path)
    assert Layout.from_file(path) == layout
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OutputError, match="No such file"):
        layout.to_file(tmp_path / "no" / "folder.json")
    with pytest.raises(InputError, match="a path"):
        layout.to_file(None)  # type: ignore[arg-type]


def test_boxes_in_other_notations_are_the_same_layout() -> None:
    expected = Layout(["dog"], [[0.25, 0.5, 0.75, 1.0]])
    for fields in (
        {"boxes": [[0.25, 0.5, 0.5, 0.5]], "box_format": "xywh"},
        {"boxes": [[160, 240, 480, 480]], "box_units": "pixel", "box_size": [640, 480]},
        {
            "boxes": [[160, 240, 320, 240]],
            "box_units": "pixel",
            "box_format": "xywh",
            "box_size": [640, 480],
        },
    ):
        assert Layout.from_json(json.dumps({"phrases": ["dog"], **fields})) == expected
    pixels = BoxNotation("xywh", "pixel", (640, 480))
    plain = {"phrases": ["dog"], "boxes": [[160, 240, 320, 240]]}
    assert Layout.from_json(json.dumps(plain), pixels) == expected
    assert Layout.parse_box("dog:160,240,320,240", pixels) == ("dog", expected.boxes[0])
    # what the file says comes first
    own = {**plain, "box_format": "xyxy", "boxes": [[160, 240, 480, 480]]}
    assert Layout.from_json(json.dumps(own), pixels) == expected
    # 0.7 + 0.3 + rounding
    rounded = Layout.from_xywh(["dog"], [[0.1 + 0.2, 0, 0.7, 1]])
    assert rounded.boxes[0][2] == 1.0
    for wrong, problem in (
        ({"box_format": "cxcywh"}, "unknown box_format"),
        ({"box_format": 3}, "unknown box_format"),
        ({"box_units": "percent"}, "unknown box_units"),
        ({"box_units": "pixel", "box_size": [0, 5]}, "size must be positive"),
        ({"box_units": "pixel", "box_size": "64"}, "width and height"),
        ({"box_units": "pixel", "box_size": ["64", True]}, "size must be positive"),
    ):
        text = json.dumps({"phrases": ["dog"], "boxes": [[0, 0, 1, 1]], **wrong})
        refused(problem, text, make=Layout.from_json)
    with pytest.raises(InputError, match="need the size"):
        BoxNotation(units="pixel")


def test_box_lists_of_other_programs() -> None:
    expected = Layout(["a dog", "a cat"], [[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.5, 0.5]])
    pairs = [["a dog", [128, 256, 256, 256]], ["a cat.", [0, 0, 256, 256]]]
    named = [{"name": name, "bounding_box": box} for name, box in pairs]
    answer = str([tuple(pair) for pair in pairs])
    for text in (
        json.dumps(pairs),
        json.dumps({"prompt": "p", "gen_boxes": pairs, "bg_prompt": "a room"}),
        json.dumps({"gen_boxes": named}),
        answer,
        f"Objects: {answer}\nBackground prompt: a room\nNegative prompt: ",
    ):
        assert Layout.from_json(text) == expected
    inputs = [("a dog", 256, 256, 128, 256), ("a cat", 256, 256, 0, 0)]
    names = ("text", "width", "height", "x", "y")
    boxes = [
        {"class_type": "GLIGENTextBoxApply", "inputs": dict(zip(names, values, strict=True))}
        for values in inputs
    ]
    size = {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512}}
    api = {str(number): node for number, node in enumerate([size, *boxes])}
    saved = {
        "nodes": [
            {"type": "EmptyLatentImage", "widgets_values": [512, 512, 1]},
            *({"type": "GLIGENTextBoxApply", "widgets_values": list(v)} for v in inputs),
            {"type": "Note"},
        ],
        "links": [],
    }
    assert Layout.from_json(json.dumps(api)) == Layout.from_json(json.dumps(saved)) == expected
    for text, problem in (
        (json.dumps({"1": boxes[0]}), "size of its image"),
        (json.dumps({"1": size}), "no GLIGENTextBoxApply"),
        (json.dumps({"1": {**boxes[0], "inputs": {"text": ["4", 0]}}}), "no value for text"),
        ("[('dog', [1, 2", "LLM-grounded"),
        ("[(" * 10**4, "LLM-grounded"),
        ('[["dog"]]', "no name with a box"),
        ('{"gen_boxes": 3}', "no name with a box"),
    ):
        with pytest.raises(InputError, match=problem):
            Layout.from_json(text)
