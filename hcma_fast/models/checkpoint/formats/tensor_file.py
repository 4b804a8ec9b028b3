"""A safetensors file: the names and shapes in its header, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.json_files import first_line, open_file

Shape = tuple[int, ...]
FileKind = Literal["safetensors", "pickle"]
_START_BYTES = 512
_ZIP, _PICKLE = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LARGEST_HEADER = 100 * 2**20
"""As safetensors has it"""


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds."""

    path: Path
    shapes: Mapping[str, Shape]
    """of every tensor, by its key"""

    @classmethod
    def read(cls, path: Path) -> TensorFile:
        """From the header.

        Raises:
            WeightsError: the file cannot be read, or is damaged.
        """
        open_file(path).close()
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
        except Exception as error:  # safetensors raises several kinds
            raise WeightsError(
                f"this file is damaged or incomplete: {first_line(error)}",
                value=str(path),
                remedy="Download it again, and compare its size or sha256 with the page's.",
            ) from error
        return cls(path, shapes)


def file_kind(path: Path) -> FileKind:
    """The format of a file of weights, by its first bytes.

    Raises:
        WeightsError: it is none, a Git LFS pointer, or cannot be read.
    """
    with open_file(path) as file:
        start = file.read(_START_BYTES)
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header <= _LARGEST_HEADER:
        return "safetensors"
    if start.startswith((_ZIP, *_PICKLE)):
        return "pickle"
    text = start.lstrip().lower()
    if not start:
        kind = "an empty file"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        kind = "a web page: the site may have asked for a login"
    elif start.startswith(b"GGUF"):
        kind = "a GGUF file"
    elif text.startswith((b"{", b"[")):
        kind = "JSON"
    else:
        kind = f"a file that begins with {start[:8].hex(' ')}"
    raise WeightsError(
        f"this is no checkpoint but {kind}",
        value=str(path),
        remedy="Give a .safetensors file, or a .ckpt, .pth or .bin file that torch wrote.",
    )
