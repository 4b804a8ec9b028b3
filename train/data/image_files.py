"""Image files as they are meant to be seen: upright, 8 bits a channel, and of a sane size."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hcma_fast.errors import InputError

MAX_PIXELS = 2**27
"""Larger images are refused before they are decoded: a small file can hold a huge one"""
#: raster formats; others, such as EPS, would start programs to be read
_FORMATS = ("PNG", "JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "PPM")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXCHANGE_SIDES = (5, 6, 7, 8)
#: the orientation that undoes another; those that are not here undo themselves
_INVERSE = {6: 8, 8: 6}
_UINT8, _UINT16 = 255.0, 65535.0
ORIENTED = "oriented as the EXIF data says"
SCALED = "scaled to 8 bits a channel"


@dataclass(frozen=True)
class OpenedImage:
    """A decoded image, and what was done to show it: some of ORIENTED and SCALED."""

    image: Image.Image
    """RGB, 8 bits"""
    changes: tuple[str, ...] = ()


def open_image_file(
    path: Path, what: str, *, size: tuple[int, int] | None = None, remedy: str | None = None
) -> OpenedImage:
    """Decode an image.

    EXIF orientations 2 to 4 are applied, as viewers do. Orientations 5 to 8 exchange width and
    height, so the annotated size decides: an image of that size as it is stored stays so. Without
    an annotated size, and for square images, they are applied. 16-bit, 32-bit and float images
    are scaled: 16-bit ones from 0..65535, float ones from 0..1, 0..255, 0..65535 or their own
    range, the first that holds them; 32-bit integers likewise, without 0..1.

    Args:
        what: what errors call it, such as "image 7".
        size: annotated (width, height) in pixels.
        remedy: what the user can do about an unusable file.

    Raises:
        InputError: it is missing, no regular file, damaged, no image of a common format, of more
            than MAX_PIXELS pixels, of another size than annotated, or not finite.
    """
    remedy = remedy or "Restore the file, or leave this image out."

    def fail(why: str, cause: Exception | None = None) -> InputError:
        error = InputError(f"cannot read {what}: {why}", value=str(path), remedy=remedy)
        error.__cause__ = cause
        return error

    if not path.is_file():
        raise fail("it is no file" if path.exists() else "the file is missing")
    try:
        with warnings.catch_warnings():
            # of many pixels, where we raise, and of damaged EXIF data, which is left out
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_known_formats()) as file:
                _check_size(file, what, path, size, remedy)
                orientation = _orientation(file)
                file.load()
                # Pillow turns TIFF files itself
                applied = orientation != 1 and _orientation(file) == 1
                values = _scaled(file)
                image = (file if values is None else Image.fromarray(values)).convert("RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        raise fail(str(error) or type(error).__name__, error) from error
    exchanged = applied and orientation in _EXCHANGE_SIDES
    upright = _applies(orientation, image.size[::-1] if exchanged else image.size, size)
    if upright and not applied:
        image = image.transpose(_UPRIGHT[orientation])
    elif applied and not upright:
        image = image.transpose(_UPRIGHT[_INVERSE.get(orientation, orientation)])
    if size is not None and image.size != size:
        raise _another_size(what, path, image.size, size, remedy)
    changes = (*((ORIENTED,) if upright else ()), *((SCALED,) if values is not None else ()))
    return OpenedImage(image, changes)


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of _FORMATS that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(
    file: Image.Image, what: str, path: Path, size: tuple[int, int] | None, remedy: str
) -> None:
    """Refuse by the header alone."""
    width, height = file.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{what} has {width} x {height} pixels, more than {MAX_PIXELS:,}",
            value=str(path),
            remedy="Scale it down, or leave this image out.",
        )
    if size is not None and size not in ((width, height), (height, width)):
        raise _another_size(what, path, file.size, size, remedy)


def _another_size(
    what: str, path: Path, found: tuple[int, int], size: tuple[int, int], remedy: str
) -> InputError:
    return InputError(
        f"{what} is of {found[0]} x {found[1]} pixels, its annotation of {size[0]} x {size[1]}",
        value=str(path),
        remedy=remedy,
    )


def _orientation(file: Image.Image) -> int:
    try:
        found = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data says nothing; viewers ignore it
        return 1
    return int(found) if found in _UPRIGHT else 1


def _applies(orientation: int, stored: tuple[int, int], size: tuple[int, int] | None) -> bool:
    if orientation in _EXCHANGE_SIDES and size is not None and stored[0] != stored[1]:
        return stored != size
    return orientation != 1


def _scaled(file: Image.Image) -> NDArray[np.uint8] | None:
    """(h, w) of an image of more than 8 bits a channel; None for others."""
    if file.mode != "F" and not file.mode.startswith("I"):
        return None
    values = np.asarray(file).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it has values that are not finite")
    tops = [_UINT16] if file.mode.startswith("I;16") or file.format in ("PNG", "PPM") else []
    tops = tops or [*([1.0] if file.mode == "F" else []), _UINT8, _UINT16]
    top = next((top for top in tops if low >= 0 and high <= top), None)
    bottom, top = (0.0, top) if top is not None else (low, high)
    shares = (values - bottom) / ((top - bottom) or 1.0)
    return np.rint(shares * 255).astype(np.uint8)
