"""Draw a layout's boxes and phrases over its image."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from hcma_fast.layout import Layout

_MIN_SIDE = 512
_FONT_SIZE = 16
_PADDING = 3
_LINE_WIDTH = 3
#: Okabe and Ito's colours, which colour-blind readers can tell apart, and the text's colour on each
_COLOURS = (
    ("#E69F00", "black"),
    ("#0072B2", "white"),
    ("#009E73", "white"),
    ("#D55E00", "white"),
    ("#CC79A7", "black"),
    ("#56B4E9", "black"),
    ("#F0E442", "black"),
)


def draw_layout(image: Image.Image, layout: Layout) -> Image.Image:
    """A copy with boxes and phrases, enlarged to 512 pixels or more so that the text is legible."""
    factor = max(1, -(-_MIN_SIDE // min(image.size)))
    width, height = image.width * factor, image.height * factor
    canvas = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT_SIZE)
    for index, (phrase, box) in enumerate(zip(layout.phrases, layout.boxes, strict=True)):
        colour, ink = _COLOURS[index % len(_COLOURS)]
        left, top = round(box[0] * (width - 1)), round(box[1] * (height - 1))
        right, bottom = round(box[2] * (width - 1)), round(box[3] * (height - 1))
        draw.rectangle((left, top, right, bottom), outline=colour, width=_LINE_WIDTH)
        label = _fit(" ".join(phrase.split()), font, width - 2 * _PADDING)
        label_width = font.getlength(label) + 2 * _PADDING
        label_height = _FONT_SIZE + 2 * _PADDING
        # inside the image whatever the box
        x = max(0.0, min(left, width - label_width))
        y = min(top, height - label_height)
        draw.rectangle((x, y, x + label_width, y + label_height), fill=colour)
        draw.text((x + _PADDING, y + _PADDING / 2), label, fill=ink, font=font)
    return canvas


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """``text``, cut with dots at the end when it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
