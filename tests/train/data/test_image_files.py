"""Images are opened upright, in 8 bits, and are refused by their size before they are decoded."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hcma_fast.errors import InputError
from hcma_fast.train.data.image_files import MAX_PIXELS, ORIENTED, SCALED, open_image_file

#: 4 x 6 pixels that no turn or mirror maps to themselves
PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
#: what a viewer shows of PIXELS, by EXIF orientation, written out
SHOWN = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS[::-1].transpose(1, 0, 2),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: PIXELS[:, ::-1].transpose(1, 0, 2),
}


def pixels(path: Path, size: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    found = open_image_file(path, "image 1", size=size)
    assert found.image.mode == "RGB"
    return np.asarray(found.image), found.changes


def save(path: Path, values: np.ndarray, orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_the_annotated_size_decides_over_orientations_that_exchange_sides(
    tmp_path: Path, suffix: str
) -> None:
    for orientation, shown in SHOWN.items():
        path = tmp_path / f"{orientation}.{suffix}"
        exif = Image.Exif()
        exif[0x0112] = orientation
        lossless = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(PIXELS).save(path, exif=exif, **lossless)
        told = () if orientation == 1 else (ORIENTED,)
        # without an annotation: as a viewer shows it
        found, changes = pixels(path)
        assert np.array_equal(found, shown) and changes == told, orientation
        if orientation < 5:
            found, changes = pixels(path, (6, 4))
            assert np.array_equal(found, shown) and changes == told, orientation
            with pytest.raises(InputError, match="is of 6 x 4 pixels, its annotation of 4 x 6"):
                pixels(path, (4, 6))
        else:
            # boxes that were drawn on the file as it is stored, and on what a viewer shows
            found, changes = pixels(path, (6, 4))
            assert np.array_equal(found, PIXELS) and changes == (), orientation
            found, changes = pixels(path, (4, 6))
            assert np.array_equal(found, shown) and changes == told, orientation


def test_a_square_image_and_damaged_exif_data(tmp_path: Path) -> None:
    square = PIXELS[:, :4]
    path = save(tmp_path / "square.png", square, 6)
    found, changes = pixels(path, (4, 4))
    assert np.array_equal(found, square[::-1].transpose(1, 0, 2)) and changes == (ORIENTED,)
    for orientation in (0, 9, 700):
        found, changes = pixels(save(tmp_path / "odd.png", PIXELS, orientation), (6, 4))
        assert np.array_equal(found, PIXELS) and changes == ()
    Image.fromarray(PIXELS).save(tmp_path / "junk.png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    found, changes = pixels(tmp_path / "junk.png", (6, 4))
    assert np.array_equal(found, PIXELS) and changes == ()


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((RAMP * 65535).round().astype(np.uint16), "png"),
        ((RAMP * 65535).round().astype(np.uint16), "tiff"),
        ((RAMP * 65535).round().astype(np.uint16), "pgm"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "tiff"),
        ((RAMP * 255).round().astype(np.int32), "tiff"),
        ((RAMP * 65535).round().astype(np.int32), "tiff"),
        (RAMP.astype(np.float32), "tiff"),
        ((RAMP * 255).astype(np.float32), "tiff"),
        ((RAMP * 10 - 3).astype(np.float32), "tiff"),
    ],
)
def test_deep_images_are_scaled_to_their_range(
    tmp_path: Path, values: np.ndarray, suffix: str
) -> None:
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(values).save(path)
    found, changes = pixels(path)
    assert changes == (SCALED,)
    assert np.array_equal(found[..., 0].ravel(), np.arange(256))
    assert np.array_equal(found[..., 0], found[..., 2])


def test_dark_deep_images_stay_dark_and_8_bits_stay_as_they_are(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 257, np.uint16)).save(tmp_path / "dark.png")
    assert (pixels(tmp_path / "dark.png")[0] == 1).all()
    Image.fromarray(np.full((4, 4), 0.2, np.float32)).save(tmp_path / "dark.tiff")
    assert (pixels(tmp_path / "dark.tiff")[0] == 51).all()
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "grey.png")
    found, changes = pixels(tmp_path / "grey.png")
    assert (found == 200).all() and changes == ()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(InputError, match="not finite"):
        pixels(tmp_path / "nan.tiff")


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def bomb(width: int, height: int) -> bytes:
    """A PNG of this size in a few bytes, whose content nobody should get to read."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", b"never decoded") + chunk(b"IEND", b"")


def test_the_size_is_checked_before_anything_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    side = int(MAX_PIXELS**0.5) + 1
    for width, height, problem in (
        (side, side, "pixels, more than"),
        (2**31 - 1, 2**31 - 1, "image 1"),
        (12_000, 9_000, "is of 12000 x 9000 pixels, its annotation of 640 x 480"),
    ):
        path.write_bytes(bomb(width, height))
        with pytest.raises(InputError, match=problem) as caught:
            pixels(path, (640, 480) if width == 12_000 else None)
        assert caught.value.value == str(path)


def test_what_is_no_image_file(tmp_path: Path) -> None:
    eps = tmp_path / "program.eps"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    # opened, it would wait for a writer for ever
    os.mkfifo(tmp_path / "pipe.png")
    for path in (*tmp_path.iterdir(), tmp_path / "missing.png"):
        with pytest.raises(InputError, match="cannot read image 1") as caught:
            pixels(path)
        assert caught.value.value == str(path) and caught.value.exit_code == 3
