"""Training pairs of the likeness judge: a crop, what it should show, and whether the eye sees it.

Right crops have the damage that a picture may have: softness, colour shift, blotches, noise, a
small VAE. Hard negatives are what the eye refuses and a texture does not: figures with parts
missing, doubled, mirrored in the middle, of two kinds, in other colours, bent, or of a few pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hcma_fast.layout import Box
from hcma_fast.train.data import emoji_scenes, emoji_scenes2
from hcma_fast.train.data.editions import EDITIONS
from hcma_fast.train.data.emoji_scenes2 import outlined

SIDE = 48
"""Side of a crop in pixels, margins included"""
MARGIN = 0.08
"""Context on each side of a box, as a share of the box"""
FIGURE = round(SIDE / (1 + 2 * MARGIN))
_GREY = 128
_SPRITE = 64
_CATEGORIES = {emoji_scenes2.phrase_of(*look): look[0] for look in emoji_scenes2.LOOKS}
Rgba = NDArray[np.uint8]
"""(side, side, 4)"""


@cache
def looks(edition: int) -> dict[str, Image.Image]:
    """The art of an edition by phrase: squares of 64 pixels, as boxes stretch them (RGBA)."""
    if edition == 1:
        names, art = emoji_scenes.CATEGORY_NAMES, emoji_scenes.sprites()
        found = dict(zip(names, art, strict=True))
    else:
        found = {
            emoji_scenes2.phrase_of(*look): sprite
            for look, sprite in emoji_scenes2.sprites().items()
        }
    size = (_SPRITE, _SPRITE)
    return {name: art.resize(size, Image.Resampling.LANCZOS) for name, art in found.items()}


def category_of(phrase: str) -> str:
    """The category of either edition's phrase, without the colour."""
    return _CATEGORIES.get(phrase, phrase)


def may_be_mirrored(edition: int, phrase: str) -> bool:
    """Does the edition draw this figure in both facings?"""
    return edition == 1 and phrase != "stop sign"


def figure(edition: int, art: Image.Image, pixels: int) -> Image.Image:
    """``art`` as a box of ``pixels`` a side has it, enlarged or reduced to FIGURE (RGBA)."""
    drawn = (
        outlined(art, pixels, pixels)
        if edition == 2
        else art.resize((pixels, pixels), Image.Resampling.LANCZOS)
    )
    return drawn.resize((FIGURE, FIGURE), Image.Resampling.BILINEAR)


@cache
def reference(edition: int, phrase: str, pixels: int) -> NDArray[np.float32]:
    """What a box of about ``pixels`` a side should show: (4, SIDE, SIDE), colours and coverage.

    Colours are in [-1, 1], 0 outside of the figure.
    """
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(figure(edition, looks(edition)[phrase], pixels), _corner())
    values = np.asarray(canvas).astype(np.float32) / 255
    mask = values[..., 3:]
    return np.concatenate([(values[..., :3] * 2 - 1) * mask, mask], -1).transpose(2, 0, 1).copy()


def _corner() -> tuple[int, int]:
    return (SIDE - FIGURE) // 2, (SIDE - FIGURE) // 2


def pixel_side(box: Box, image_size: int) -> int:
    """Mean side of ``box`` in pixels, to the next multiple of 4 between 8 and 64."""
    mean = ((box[2] - box[0]) * (box[3] - box[1])) ** 0.5 * image_size
    return int(min(max(4 * round(mean / 4), 8), 64))


def cut(picture: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """``box`` and its margin, (SIDE, SIDE, 3); beyond the picture its edge goes on."""
    side = picture.shape[0]
    pad = side // 8
    padded = Image.fromarray(np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
    dx, dy = MARGIN * (box[2] - box[0]), MARGIN * (box[3] - box[1])
    x0, x1 = (v * side + pad for v in (box[0] - dx, box[2] + dx))
    y0, y1 = (v * side + pad for v in (box[1] - dy, box[3] + dy))
    limits = (max(x0, 0.0), max(y0, 0.0), min(x1, side + 2.0 * pad), min(y1, side + 2.0 * pad))
    return np.asarray(padded.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=limits))


# -- figures that the eye refuses ------------------------------------------------------------------


def without_parts(rng: np.random.Generator, art: Rgba) -> Rgba:
    """A third to two thirds of the figure is gone, along a straight line."""
    y, x = np.mgrid[0:_SPRITE, 0:_SPRITE] / _SPRITE - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    height = np.cos(angle) * x + np.sin(angle) * y
    solid = art[..., 3] > 128
    limit = np.quantile(height[solid], rng.uniform(0.35, 0.65))
    out = art.copy()
    out[height < limit, 3] = 0
    return out


def doubled(rng: np.random.Generator, art: Rgba) -> Rgba:
    """Two copies over each other, the second mirrored or moved."""
    if rng.random() < 0.5:
        second = art[:, ::-1]
    else:
        step = int(rng.choice([-1, 1]) * rng.integers(_SPRITE // 6, _SPRITE // 3))
        second = np.roll(art, step, axis=int(rng.integers(2)))
    return _blend(rng, art, second)


def _blend(rng: np.random.Generator, first: Rgba, second: Rgba) -> Rgba:
    """Half of one and half of another in each place, more of either here and there."""
    weight = torch.from_numpy(rng.random((1, 1, 4, 4)))
    weight = F.interpolate(0.2 + 0.6 * weight, (_SPRITE, _SPRITE), mode="bilinear")
    share = weight[0, 0, :, :, None].numpy()
    mask = first[..., 3:] / 255 * share, second[..., 3:] / 255 * (1 - share)
    alpha = mask[0] + mask[1]
    colour = (first[..., :3] * mask[0] + second[..., :3] * mask[1]) / np.maximum(alpha, 1e-3)
    grown = np.maximum(first[..., 3:], second[..., 3:]) * np.minimum(1, alpha * 1.6)
    return np.concatenate([colour, grown], -1).clip(0, 255).astype(np.uint8)


def mirrored_halves(rng: np.random.Generator, art: Rgba) -> Rgba:
    """One half of the figure on both sides: two heads."""
    half = _SPRITE // 2
    part = art[:, :half] if rng.random() < 0.5 else art[:, half:][:, ::-1]
    return np.concatenate([part, part[:, ::-1]], axis=1)


def other_colours(rng: np.random.Generator, art: Rgba) -> Rgba:
    """Hues turned by a sixth to five sixths of the circle, or channels swapped."""
    colours = Image.fromarray(np.ascontiguousarray(art[..., :3])).convert("HSV")
    values = np.asarray(colours).copy()
    values[..., 0] += np.uint8(rng.integers(50, 206))
    turned = np.asarray(Image.fromarray(values, "HSV").convert("RGB"))
    return np.concatenate([turned, art[..., 3:]], -1)


def is_colourful(art: Rgba) -> bool:
    """Would other colours be seen?"""
    solid = art[art[..., 3] > 128][:, :3].astype(np.int16)
    return bool((solid.max(-1) - solid.min(-1)).mean() > 70)


def is_lopsided(art: Rgba) -> bool:
    """Does the figure differ from its mirror image?"""
    shown = art[..., :3] * (art[..., 3:] / 255)
    return bool(np.abs(shown - shown[:, ::-1]).mean() > 18)


def chimera(rng: np.random.Generator, art: Rgba, other: Rgba) -> Rgba:
    """A half of one figure and a half of another, or both blended."""
    if rng.random() < 0.4:
        return _blend(rng, art, other)
    out, axis = art.copy(), rng.random()
    if axis < 0.5:
        out[:, : _SPRITE // 2] = other[:, : _SPRITE // 2]
    else:
        out[: _SPRITE // 2] = other[: _SPRITE // 2]
    return out


# -- pairs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A crop, what it should show and how much it does; the damage that is done in batches."""

    crop: NDArray[np.uint8]
    reference: NDArray[np.float32]
    right: float
    """1 is right, 0 is wrong; half lies between"""
    bend: float = 0.0
    """largest displacement, as a share of the side"""
    blur: int = SIDE
    """pixels a side that are left"""


class Pairs:
    """Pairs of both editions, drawn by step number.

    Args:
        labelled: pairs of labelled boxes; three fifths of each batch.
        decoded: pairs of pictures that went through a VAE, a tenth.
    """

    def __init__(self, labelled: Sequence[Pair] = (), decoded: Sequence[Pair] = ()) -> None:
        self._labelled, self._decoded = labelled, decoded
        self._backgrounds = {
            number: [
                np.asarray(
                    edition.render(
                        emoji_scenes.Scene(("",), phrase, ()), "judge", index, edition.image_size
                    )
                )
                for phrase in edition.backgrounds
                for index in range(6)
            ]
            for number, edition in EDITIONS.items()
        }

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Crops (B, 3, SIDE, SIDE) in [0, 1], references (B, 4, SIDE, SIDE), right (B,)."""
        rng = np.random.default_rng([13, step])
        pairs = [self._draw(rng) for _ in range(size)]
        crops = torch.from_numpy(np.stack([p.crop for p in pairs])).permute(0, 3, 1, 2) / 255
        generator = torch.Generator().manual_seed(step)
        crops = damage(
            crops,
            torch.tensor([p.bend for p in pairs]),
            [p.blur for p in pairs],
            generator,
        )
        references = torch.from_numpy(np.stack([p.reference for p in pairs]))
        return crops, references, torch.tensor([p.right for p in pairs])

    def _draw(self, rng: np.random.Generator) -> Pair:
        lot = rng.random()
        if self._labelled and lot < 0.6:
            return self._labelled[int(rng.integers(len(self._labelled)))]
        if self._decoded and lot < 0.7:
            return self._decoded[int(rng.integers(len(self._decoded)))]
        return self.synthetic(rng)

    def synthetic(self, rng: np.random.Generator) -> Pair:
        """Half right, half a hard negative of any kind."""
        edition = 1 + int(rng.random() < 0.5)
        arts = looks(edition)
        phrase = str(rng.choice(list(arts)))
        art = np.asarray(arts[phrase])
        pixels = int(rng.choice([14, 20, 28, 36, 44, 56]))
        right, bend, blur = rng.random() < 0.5, rng.uniform(0, 0.02), SIDE
        if right:
            blur = int(rng.integers(24, SIDE + 1))
        else:
            art, bend, blur = _spoil(rng, edition, phrase, art, bend)
        facing = art
        if may_be_mirrored(edition, phrase) and rng.random() < 0.5:
            facing = art[:, ::-1]
        backgrounds = self._backgrounds[edition]
        background = backgrounds[int(rng.integers(len(backgrounds)))]
        crop = _compose(rng, background, edition, facing, pixels)
        wanted = reference(edition, phrase, min(64, 4 * round(pixels / 4)))
        if facing is not art:
            # the judge tries both facings, and keeps the better
            wanted = np.ascontiguousarray(wanted[..., ::-1])
        return Pair(crop, wanted, float(right), bend, blur)


def _spoil(
    rng: np.random.Generator, edition: int, phrase: str, art: Rgba, bend: float
) -> tuple[Rgba, float, int]:
    """The figure spoilt, or what is to be done with the crop: bend and blur."""
    arts = looks(edition)
    others = [name for name in arts if name != phrase]
    other = np.asarray(arts[str(rng.choice(others))])
    kinds: list[Callable[[], Rgba]] = [
        lambda: without_parts(rng, art),
        lambda: without_parts(rng, art),
        lambda: doubled(rng, art),
        lambda: chimera(rng, art, other),
        lambda: other,
        lambda: np.zeros_like(art),
    ]
    if is_colourful(art):
        kinds += [lambda: other_colours(rng, art)]
    siblings = [
        name
        for name in others
        if category_of(name) == category_of(phrase) and _differ(arts, name, phrase)
    ]
    if siblings:
        kinds += [lambda: np.asarray(arts[str(rng.choice(siblings))])]
    if is_lopsided(art):
        kinds += [lambda: mirrored_halves(rng, art)]
    choice = int(rng.integers(len(kinds) + 3))
    if choice < len(kinds):
        return kinds[choice](), bend, int(rng.integers(24, SIDE + 1))
    if choice == len(kinds):
        return art, bend, int(rng.integers(3, 7))
    return art, float(rng.uniform(0.09, 0.2)), int(rng.integers(12, 36))


def _differ(arts: dict[str, Image.Image], first: str, second: str) -> bool:
    """Is the colour of two looks another one? A natural look may have the colour of a named one."""
    a, b = (np.asarray(arts[name]).astype(np.int16) for name in (first, second))
    return bool(np.abs(a - b).mean() > 8)


def _compose(
    rng: np.random.Generator, background: NDArray[np.uint8], edition: int, art: Rgba, pixels: int
) -> NDArray[np.uint8]:
    """The figure on a piece of background, a little beside its place; at times a neighbour."""
    side = background.shape[0]
    width = int(rng.integers(side // 4, side))
    x, y = (int(v) for v in rng.integers(0, side - width + 1, size=2))
    piece = Image.fromarray(background[y : y + width, x : x + width])
    canvas = piece.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGBA")
    if rng.random() < 0.3:
        arts = list(looks(edition).values())
        neighbour = figure(edition, arts[int(rng.integers(len(arts)))], pixels)
        shift = [int(v) for v in rng.integers(-3, 4, size=2)]
        shift[int(rng.integers(2))] = int(rng.choice([-1, 1])) * (FIGURE - int(rng.integers(0, 5)))
        canvas.alpha_composite(_moved(neighbour, shift[0], shift[1]))
    size = [int(v) for v in FIGURE * rng.uniform(0.94, 1.06, size=2)]
    shown = figure(edition, Image.fromarray(np.ascontiguousarray(art)), pixels)
    shown = shown.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    shift = [int(v) for v in rng.integers(-2, 3, size=2)]
    canvas.alpha_composite(_moved(shown, shift[0], shift[1]))
    return np.asarray(canvas.convert("RGB"))


def _moved(art: Image.Image, dx: int, dy: int) -> Image.Image:
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste(art, ((SIDE - art.width) // 2 + dx, (SIDE - art.height) // 2 + dy))
    return layer


def damage(
    crops: Tensor, bends: Tensor, blurs: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Bend by (B,) shares of the side, soften to so many pixels, shift colours, add noise."""
    count, side = len(crops), crops.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    rows = torch.linspace(-1, 1, side)
    grid = torch.stack(torch.meshgrid(rows, rows, indexing="xy"), -1).expand(count, -1, -1, -1)
    field = torch.randn(count, 2, 5, 5, generator=generator)
    field = F.interpolate(field, (side, side), mode="bicubic", align_corners=True)
    moved = grid + field.permute(0, 2, 3, 1) * bends.view(-1, 1, 1, 1) * 1.2
    out = F.grid_sample(crops, moved.float(), padding_mode="border", align_corners=True)
    soft = [
        F.interpolate(
            F.interpolate(one[None], (size, size), mode="area"), (side, side), mode="bilinear"
        )
        if size < side
        else one[None]
        for one, size in zip(out, blurs, strict=True)
    ]
    out = torch.cat(soft)
    out = out * uniform(0.9, 1.1, 3, 1, 1) + uniform(-0.06, 0.06, 3, 1, 1)
    blotches = torch.randn(count, 3, 6, 6, generator=generator)
    blotches = F.interpolate(blotches, (side, side), mode="bilinear")
    noise = torch.randn(out.shape, generator=generator)
    out = out + uniform(0, 0.05, 1, 1, 1) * blotches + uniform(0, 0.04, 1, 1, 1) * noise
    return out.clamp(0, 1)
