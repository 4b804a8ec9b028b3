"""Render the sprite sheet of EmojiScenes' second edition from two open sets of SVG emoji.

Run once by a maintainer; the sheet is committed, so that nobody else needs the icons::

    npm install @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9
    pip install resvg-py==0.5.0
    python -m hcma_fast.train.data.make_sprites2 --icons node_modules/@iconify-json

Each figure is drawn at four times its size and reduced. Coloured looks replace the fills that
``_TINTS`` names, light ones by a lighter and dark ones by a darker shade of the colour.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hcma_fast.errors import InputError
from hcma_fast.files import write_whole
from hcma_fast.program import run_program
from hcma_fast.train.data.emoji_scenes import ASSETS
from hcma_fast.train.data.emoji_scenes2 import (
    CATEGORIES,
    COLOURS,
    LOOKS,
    SHEET_COLUMNS,
    SPRITE_SIDE,
)

_SCALE = 4

#: of coloured categories: the fills that take the colour, and how light (1 is the colour itself)
_TINTS: dict[str, dict[str, float]] = {
    "car": {"#f8312f": 1.0},
    "bus": {"#ffb02e": 0.8, "#e6e6e6": 1.0},
    "truck": {"#fcd53f": 1.0, "#ff822d": 0.8},
    "boat": {"#fcd53f": 1.0},
    "backpack": {"#f8312f": 1.0, "#ca0b4a": 0.7},
    "umbrella": {"#8d65c5": 1.0},
    "suitcase": {"#00a6ed": 1.0, "#26eafc": 1.35},
    "apple": {"#f8312f": 1.0},
    "chair": {"#a56953": 1.0, "#7d4533": 0.8, "#402a32": 0.5},
    "couch": {"#3f5fff": 1.0, "#1345b7": 0.75, "#5092ff": 1.25},
    "book": {"#ca0b4a": 1.0, "#990838": 0.75},
    "clock": {"#f8312f": 1.0},
}
#: fills that are replaced in all looks: more contrast, and colours that tell categories apart
_SWAPS: dict[str, dict[str, str]] = {
    "zebra": {"#d3d3d3": "#ffffff", "#636363": "#1c1c1c", "#9b9b9b": "#3a3a3a"},
    "bus": {"#e6e6e6": "#ffc83d"},
    "truck": {"#fcd53f": "#e8e8f0", "#ff822d": "#8a94a8"},
    "donut": {"#6d4534": "#f47fb8", "#ff6dc6": "#ffffff"},
    "stop sign": {"#d3d3d3": "#ffffff"},
}
#: fills whose shapes are left out: the couch's lamp
_OMITTED = {"couch": ("#9b9b9b", "#ffb02e")}
_WORD_STOP = (
    '<g fill="none" stroke="#fff" stroke-width="1.7" stroke-linecap="round">'
    '<path d="M9.2 13.4H6.4v2.6h2.8v2.6H6.4M11.2 13.4h3.6M13 13.4v5.2M16.8 13.4h2.6v5.2h-2.6z'
    'M22 18.6v-5.2h2.8v2.8H22"/></g>'
)


def read_icons(folder: Path, name: str) -> dict[str, Any]:
    """``folder/name/icons.json``, as the npm package has it.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / name / "icons.json"
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot read the icons",
            value=str(path),
            remedy=f"npm install @iconify-json/{name}, and give node_modules/@iconify-json.",
        ) from error
    return found


def shade(colour: tuple[int, int, int], light: float) -> str:
    """``colour`` as #rrggbb, darker for ``light`` below 1, nearer to white above."""
    if light <= 1:
        values = [round(v * light) for v in colour]
    else:
        values = [round(255 - (255 - v) / light**2) for v in colour]
    return "#{:02x}{:02x}{:02x}".format(*values)


def recoloured(body: str, category: str, colour: str | None) -> str:
    """The SVG elements of a look, from those of the icon."""
    for fill in _OMITTED.get(category, ()):
        body = re.sub(rf'<path fill="{fill}"[^>]*/>', "", body)
    fills: dict[str, str] = dict(_SWAPS.get(category, {}))
    if colour is not None:
        tints = _TINTS[category].items()
        fills |= {fill: shade(COLOURS[colour], light) for fill, light in tints}
    if fills:
        # all at once: a new colour may be another one's old
        body = re.sub("|".join(fills), lambda match: fills[match[0]], body)
    return body + (_WORD_STOP if category == "stop sign" else "")


def draw(icons: Mapping[str, Any], name: str, category: str, colour: str | None) -> Image.Image:
    """A look, cropped to its visible pixels and fitted into a SPRITE_SIDE square (RGBA)."""
    import resvg_py

    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = recoloured(icon["body"], category, colour)
    side = SPRITE_SIDE * _SCALE
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{side}" height="{side}">{body}</svg>'
    )
    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    figure = picture.crop(picture.getchannel("A").getbbox())
    scale = SPRITE_SIDE / max(figure.size)
    size = (max(1, round(figure.width * scale)), max(1, round(figure.height * scale)))
    cell = Image.new("RGBA", (SPRITE_SIDE, SPRITE_SIDE))
    cell.paste(figure.resize(size, Image.Resampling.LANCZOS))
    return cell


def draw_sheet(icons: Path) -> Image.Image:
    """All looks in the order of ``LOOKS``, row by row.

    Raises:
        InputError: a set of icons cannot be read.
    """
    sets = {name: read_icons(icons, name) for name in ("fluent-emoji-flat", "noto")}
    glyphs = {c.name: c.glyph for c in CATEGORIES}
    rows = -(-len(LOOKS) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SPRITE_SIDE * SHEET_COLUMNS, SPRITE_SIDE * rows))
    for index, (category, colour) in enumerate(LOOKS):
        prefix, _, name = glyphs[category].rpartition(":")
        row, column = divmod(index, SHEET_COLUMNS)
        cell = draw(sets[prefix or "fluent-emoji-flat"], name, category, colour)
        sheet.paste(cell, (column * SPRITE_SIDE, row * SPRITE_SIDE))
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hcma_fast.train.data.make_sprites2",
        description="Render assets/sprites2.png, the art of EmojiScenes' second edition.",
    )
    parser.add_argument(
        "--icons", type=Path, required=True, help="folder with fluent-emoji-flat/ and noto/"
    )
    parser.add_argument("--out", type=Path, default=ASSETS / "sprites2.png")
    args = parser.parse_args(arguments)
    sheet = draw_sheet(args.icons)
    write_whole(args.out, lambda file: sheet.save(file, "PNG", optimize=True))
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_program(main))
