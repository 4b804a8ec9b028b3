"""Render EmojiScenes' sprite sheet from Debian's Noto Color Emoji font.

Run once by a maintainer, ``python -m hcma_fast.train.data.make_sprites``, after ``apt-get install
fonts-noto-color-emoji``; the sheet is committed, so that nobody else needs the font.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hcma_fast.train.data.emoji_scenes import ASSETS, CATEGORIES, SPRITE_SIDE

_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_STRIKE = 109  # the only bitmap size that the font holds


def render_sprite(glyph: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One glyph, cropped to its visible pixels and fitted into a SPRITE_SIDE square (RGBA)."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((10, 10), glyph, font=font, embedded_color=True)
    bounds = canvas.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    if bounds is None:
        raise SystemExit(f"the font has no picture for {glyph!r}")
    return canvas.crop(bounds).resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    if not _FONT.exists():
        raise SystemExit(f"{_FONT} is missing: apt-get install fonts-noto-color-emoji")
    font = ImageFont.truetype(str(_FONT), size=_STRIKE)
    sheet = Image.new("RGBA", (SPRITE_SIDE * len(CATEGORIES), SPRITE_SIDE))
    for column, category in enumerate(CATEGORIES):
        sheet.paste(render_sprite(category.glyph, font), (column * SPRITE_SIDE, 0))
    sheet.save(ASSETS / "sprites.png", optimize=True)
    print(f"wrote {ASSETS / 'sprites.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()
