"""Ways to write phrases with boxes: xyxy or xywh, shares or pixels, and other programs' files."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hcma_fast.errors import InputError, Remedy
from hcma_fast.files import parse_json
from hcma_fast.scalars import real_number

Box = tuple[float, float, float, float]
BOX_FORMATS = ("xyxy", "xywh")
BOX_UNITS = ("share", "pixel")
_NOTATION_KEYS = {"box_format", "box_units", "box_size"}
_LAYOUT_REMEDY = 'Write {"phrases": ["dog"], "boxes": [[0.1, 0.1, 0.5, 0.9]]}.'
_SIZE_REMEDY = Remedy(
    "Give its width and height in pixels as size, or as box_size in the file.",
    command="Give --box-size WIDTH HEIGHT in pixels, or box_size in the file.",
)
#: what a sum of shares, or a division by the size, may exceed 1 by
_ROUNDING = 1e-6
#: LLM-grounded diffusion: x, y, width, height in pixels of a canvas of this size
_LLM_SIZE = (512.0, 512.0)
_LLM_PARTS = ("Background prompt:", "Negative prompt:")
_COMFY_BOX, _COMFY_SIZE = "GLIGENTextBoxApply", "EmptyLatentImage"


@dataclass(frozen=True)
class BoxNotation:
    """What the four numbers of a box mean.

    Raises:
        InputError: an unknown format or unit, or pixels without the size of their image.
    """

    format: str = "xyxy"
    units: str = "share"
    size: tuple[float, float] | None = None
    """width and height in pixels of the image that boxes in pixels belong to"""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("box_format", self.format, BOX_FORMATS),
            ("box_units", self.units, BOX_UNITS),
        ):
            if value not in known:
                raise InputError(
                    f"unknown {name}", value=value, remedy=f"Use {' or '.join(known)}."
                )
        if self.size is not None:
            object.__setattr__(self, "size", check_size(*self.size))
        elif self.units == "pixel":
            raise InputError(
                "boxes in pixels need the size of their image",
                remedy=_SIZE_REMEDY,
            )

    def updated(self, fields: Mapping[str, Any]) -> BoxNotation:
        """With the ``box_format``, ``box_units`` and ``box_size`` that a file gives, if any."""
        size = fields.get("box_size")
        if size is not None:
            if not isinstance(size, list) or len(size) != 2:
                raise InputError(
                    "box_size must hold width and height", value=size, remedy="Write [640, 480]."
                )
            size = check_size(*size)
        return BoxNotation(
            self.format if fields.get("box_format") is None else fields["box_format"],
            self.units if fields.get("box_units") is None else fields["box_units"],
            self.size if size is None else size,
        )

    def to_shares(self, boxes: Iterable[Sequence[float]]) -> list[Box]:
        """``boxes`` as xyxy in shares of the image."""
        rows = four_numbers(boxes)
        if self.format == "xywh":
            rows = [(x, y, x + width, y + height) for x, y, width, height in rows]
        if self.units == "pixel" and self.size is not None:
            width, height = self.size
            rows = [(a / width, b / height, c / width, d / height) for a, b, c, d in rows]
        if self == SHARES:
            return rows
        a_little = 1 + _ROUNDING
        return [tuple(1.0 if 1 < v <= a_little else v for v in row) for row in rows]  # type: ignore[misc]


SHARES = BoxNotation()


def four_numbers(boxes: Iterable[Sequence[float]]) -> list[Box]:
    """Each box as four floats; text and truth values, which float() would read, are refused."""
    try:
        rows = [tuple(box) for box in boxes]
    except TypeError as error:
        raise InputError(
            f"boxes must be a list of boxes ({error})",
            value=boxes,
            remedy="Write [[0.1, 0.1, 0.5, 0.9]].",
        ) from error
    found: list[Box] = []
    for index, row in enumerate(rows):
        try:
            if any(isinstance(value, str | bytes | bool) for value in row):
                raise TypeError("text or a truth value")
            a, b, c, d = (float(value) for value in row)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(
                f"box {index} is not four numbers",
                value=row,
                remedy="Give four numbers, x0, y0, x1, y1 as shares of the image.",
            ) from error
        found.append((a, b, c, d))
    return found


def check_size(width: object, height: object) -> tuple[float, float]:
    """Width and height of an image in pixels, as floats.

    Raises:
        InputError: one is not a positive number.
    """
    try:
        found = real_number(width), real_number(height)
    except ValueError:
        found = (0.0, 0.0)
    if min(found) <= 0:
        raise InputError(
            "the image size must be positive",
            value=(width, height),
            remedy="Give width and height in pixels.",
        )
    return found


def read_box_list(
    text: str | bytes, notation: BoxNotation = SHARES, what: str = "a layout"
) -> tuple[list[Any], list[Box]]:
    """Phrases, not checked yet, and boxes in xyxy shares, from the text of a layout file.

    It is ``{"phrases": [...], "boxes": [...]}``, with ``box_format``, ``box_units`` and
    ``box_size`` if wanted; or boxes of LLM-grounded diffusion (a model's answer, or a record with
    ``gen_boxes``); or a ComfyUI workflow with GLIGENTextBoxApply nodes.

    Raises:
        InputError: it is none of these.
    """
    if not isinstance(text, str | bytes):
        raise InputError(f"{what} must be text", value=text, remedy=_LAYOUT_REMEDY)
    decoded = text if isinstance(text, str) else text.decode("utf-8", errors="replace")
    if decoded.lstrip("\ufeff \t\r\n").startswith(("Objects:", "[(")):
        return llm_boxes(llm_answer(decoded)["gen_boxes"], notation)
    data = parse_json(text, what)
    if isinstance(data, list) and data:
        return llm_boxes(data, notation)
    if not isinstance(data, dict):
        raise InputError(
            f"{what} is a JSON object with exactly the keys phrases and boxes",
            value=type(data).__name__,
            remedy=_LAYOUT_REMEDY,
        )
    if "gen_boxes" in data:
        return llm_boxes(data["gen_boxes"], notation)
    if is_comfy(data):
        return comfy_boxes(data, notation)
    if set(data) - _NOTATION_KEYS != {"phrases", "boxes"}:
        raise InputError(
            f"{what} has exactly the keys phrases and boxes (box_format, box_units, box_size "
            "where they are needed)",
            value=sorted(data),
            remedy=_LAYOUT_REMEDY,
        )
    if not isinstance(data["phrases"], list) or not isinstance(data["boxes"], list):
        raise InputError(
            "phrases and boxes must be lists",
            value=tuple(type(data[key]).__name__ for key in ("phrases", "boxes")),
            remedy=_LAYOUT_REMEDY,
        )
    return data["phrases"], notation.updated(data).to_shares(data["boxes"])


def llm_answer(text: str) -> dict[str, Any]:
    """``gen_boxes`` and ``neg_prompt`` of a model's answer in LLM-grounded diffusion.

    It reads ``[('a dog', [x, y, width, height]), ...]``, then "Background prompt: ..." and
    "Negative prompt: ..." if wanted.

    Raises:
        InputError: it reads otherwise.
    """
    boxes, _, rest = text.lstrip("\ufeff \t\r\n").partition(_LLM_PARTS[0])
    negative = rest.partition(_LLM_PARTS[1])[2].strip()
    try:
        found = ast.literal_eval(boxes.strip().removeprefix("Objects:").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise InputError(
            "these boxes are not in the form of LLM-grounded diffusion",
            value=text[:80],
            remedy="Write [('a dog', [X, Y, WIDTH, HEIGHT]), ...] in pixels of 512 x 512.",
        ) from error
    return {"gen_boxes": found, "neg_prompt": "" if negative == "None" else negative}


def llm_boxes(entries: Any, notation: BoxNotation) -> tuple[list[Any], list[Box]]:
    """From ``[name, [x, y, width, height]]`` or ``{"name": ..., "bounding_box": [...]}`` each.

    Args:
        notation: its size replaces the canvas of 512 x 512 pixels.

    Raises:
        InputError: an entry is neither.
    """
    phrases, boxes = [], []
    for index, entry in enumerate(entries if isinstance(entries, list | tuple) else [entries]):
        if isinstance(entry, dict) and {"name", "bounding_box"} <= set(entry):
            phrase, box = entry["name"], entry["bounding_box"]
        elif isinstance(entry, list | tuple) and len(entry) == 2:
            phrase, box = entry
        else:
            raise InputError(
                f"entry {index} of the box list is no name with a box",
                value=entry,
                remedy='Write [["a dog", [X, Y, WIDTH, HEIGHT]], ...] in pixels, or '
                + _LAYOUT_REMEDY.removeprefix("Write "),
            )
        phrases.append(phrase.rstrip(".") if isinstance(phrase, str) else phrase)
        boxes.append(box)
    pixels = BoxNotation("xywh", "pixel", notation.size or _LLM_SIZE)
    return phrases, pixels.to_shares(boxes)


def is_comfy(data: Mapping[str, Any]) -> bool:
    """Is this a ComfyUI workflow, as saved or in the API format?"""
    if isinstance(data.get("nodes"), list):
        return True
    return bool(data) and all(isinstance(n, dict) and "class_type" in n for n in data.values())


def comfy_boxes(data: Mapping[str, Any], notation: BoxNotation) -> tuple[list[Any], list[Box]]:
    """The boxes of a workflow's GLIGENTextBoxApply nodes, in pixels of its EmptyLatentImage.

    Raises:
        InputError: it has none, its sizes differ, or a node lacks a value.
    """
    nodes = _comfy_nodes(data)
    sizes = {(n["width"], n["height"]) for kind, n in nodes if kind == _COMFY_SIZE}
    size = notation.size
    if size is None and len(sizes) == 1:
        width, height = sizes.pop()
        size = check_size(width, height)
    if size is None:
        raise InputError(
            f"this workflow does not say the one size of its image ({_COMFY_SIZE})",
            value=sorted(map(str, sizes)) or None,
            remedy=_SIZE_REMEDY,
        )
    found = [values for kind, values in nodes if kind == _COMFY_BOX]
    if not found:
        raise InputError(
            f"this workflow has no {_COMFY_BOX} node", remedy="Give one with GLIGEN boxes."
        )
    rows = [[n["x"], n["y"], n["width"], n["height"]] for n in found]
    pixels = BoxNotation("xywh", "pixel", size)
    return [values["text"] for values in found], pixels.to_shares(rows)


def _comfy_nodes(data: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(kind, values) of the nodes that hold boxes and sizes, in either of ComfyUI's formats."""
    names = {
        _COMFY_BOX: ("text", "width", "height", "x", "y"),
        _COMFY_SIZE: ("width", "height"),
    }
    saved = data.get("nodes")
    found = []
    for node in saved if isinstance(saved, list) else data.values():
        kind = (node.get("class_type") or node.get("type")) if isinstance(node, dict) else None
        if not isinstance(kind, str) or kind not in names:
            continue
        if isinstance(saved, list):
            given = node.get("widgets_values")
            given = given if isinstance(given, list) else []
            values = dict(zip(names[kind], given, strict=False))
        else:
            given = node.get("inputs")
            values = given if isinstance(given, dict) else {}
        lacks = [
            name for name in names[kind] if not isinstance(values.get(name), int | float | str)
        ]
        if lacks:
            raise InputError(
                f"a {kind} node of this workflow has no value for {lacks[0]}",
                value=values,
                remedy="Type the values into the node instead of connecting them.",
            )
        found.append((kind, values))
    return found


def comfy_prompts(data: Mapping[str, Any]) -> tuple[str, str]:
    """The caption and the negative prompt of a workflow in ComfyUI's API format.

    The caption is the text that the first GLIGENTextBoxApply node adds its box to.

    Raises:
        InputError: it is in the other format, or the caption is not a text of a CLIPTextEncode.
    """
    kinds: dict[str, tuple[Any, Any]] = {
        key: (node.get("class_type"), node.get("inputs"))
        for key, node in data.items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    boxes = [inputs for kind, inputs in kinds.values() if kind == _COMFY_BOX]
    samplers = [inputs for kind, inputs in kinds.values() if "negative" in inputs]
    prompt = _comfy_text(kinds, boxes[0].get("conditioning_to")) if boxes else None
    if prompt is None:
        raise InputError(
            "the caption of this ComfyUI workflow was not found",
            remedy="Save it in the API format, with the text in a CLIPTextEncode node.",
        )
    negative = _comfy_text(kinds, samplers[0]["negative"]) if samplers else None
    return prompt, negative or ""


def _comfy_text(kinds: Mapping[str, tuple[Any, Any]], link: Any) -> str | None:
    """The text at the start of a chain of conditionings; a link is [node, number of output]."""
    for _ in kinds:
        if not isinstance(link, list) or not link or not isinstance(link[0], str):
            return None
        kind, inputs = kinds.get(link[0], (None, {}))
        if kind == "CLIPTextEncode":
            return inputs["text"] if isinstance(inputs.get("text"), str) else None
        link = inputs.get("conditioning_to", inputs.get("conditioning"))
    return None
