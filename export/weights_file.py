"""The weights of all graphs of a folder, in one file: what two graphs share is written once."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import onnx
import onnx_ir as ir
from onnx.external_data_helper import uses_external_data
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from hcma_fast.errors import EngineError

WEIGHTS_FILE = "weights.bin"
_SMALL_BYTES = 1024
"""tensors up to this size stay in the graph, where shape inference needs them"""
_ALIGNMENT = 64
"""of each tensor in the file, for loaders that map it into memory"""


class WeightsFile:
    """Moves the weights of graphs into ``folder/weights.bin``; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[tuple[str, bytes], tuple[int, int]] = {}

    def __enter__(self) -> Self:
        self._file = (self.folder / WEIGHTS_FILE).open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def save(self, model: ir.Model, path: Path) -> None:
        """Write ``model`` to ``path``, in this folder, and what it weighs to the shared file."""
        for initializer in model.graph.initializers.values():
            tensor = initializer.const_value
            if tensor is None or tensor.nbytes <= _SMALL_BYTES:
                continue
            offset, length = self._place(tensor)
            initializer.const_value = ir.ExternalTensor(
                WEIGHTS_FILE,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=initializer.name or "",
                base_dir=self.folder,
            )
        self._file.flush()
        # where each node comes from in torch and in this file system: half of the graph's size
        ClearMetadataAndDocStringPass()(model)
        ir.save(model, path)

    def _place(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        data = tensor.tobytes()
        # with the dtype: TensorRT refuses one place that is 640 numbers here and 1,280 there
        digest = (str(tensor.dtype), hashlib.sha256(data).digest())
        if digest not in self._places:
            padding = -self._file.tell() % _ALIGNMENT
            self._file.write(bytes(padding))
            self._places[digest] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._places[digest]


@dataclass(frozen=True)
class Place:
    """Where a graph's tensor lies: a file beside the graph, and the bytes in it."""

    file: str
    offset: int
    length: int


def check_external_data(path: Path) -> onnx.ModelProto:
    """Refuse a graph that reads its weights from anywhere but plain files of its own folder.

    Returns:
        the graph, without these weights.

    Raises:
        EngineError: it is no ONNX file, or names a file that is absolute, outside of the folder,
            missing, a symbolic or hard link, or shorter than what the graph wants from it.
    """

    def size_of(name: str) -> int | None:
        file = path.parent / name
        if file.is_symlink() or not file.is_file() or file.stat().st_nlink != 1:
            return None
        return file.stat().st_size

    try:
        content = path.read_bytes()
    except OSError as error:
        raise unusable("this file is not an ONNX graph", path) from error
    model = graph_of(content, path)
    weight_places(model, size_of)
    return model


def graph_of(content: bytes, path: Path) -> onnx.ModelProto:
    """The graph in ``content``, without the weights that lie in other files.

    Args:
        path: for the message.

    Raises:
        EngineError: it is no ONNX graph.
    """
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # protobuf and onnx raise kinds of their own
        raise unusable("this file is not an ONNX graph", path) from error


def weight_places(model: onnx.ModelProto, size_of: Callable[[str], int | None]) -> dict[str, Place]:
    """Where the tensors lie that are not in the graph itself, by name.

    Args:
        size_of: bytes of the file by that name beside the graph; None where there is none.

    Raises:
        EngineError: the graph names a file that is absolute, outside of its folder, missing or too
            short, or has such weights elsewhere than among its own initializers.
    """
    places: dict[str, Place] = {}
    own = len(model.graph.initializer)
    for number, tensor in enumerate(_tensors(model)):
        if not uses_external_data(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = PurePosixPath(entries.get("location", ""))
        if location.is_absolute() or len(location.parts) != 1 or location.parts[0] == "..":
            raise unusable("a graph reads weights outside of its folder", location)
        size = size_of(location.name)
        if size is None:
            raise unusable("a graph's weights are missing, or a link", location)
        numbers = [entries.get(key) or "0" for key in ("offset", "length")]
        if not all(number.isdecimal() for number in numbers):
            raise unusable("a graph's weights have no place in their file", numbers)
        offset, length = map(int, numbers)
        if offset + length > size:
            raise unusable("a graph's weights are cut off", location)
        if number >= own or length != _bytes_of(tensor):
            raise unusable("a graph's weights do not fit it", tensor.name)
        places[tensor.name] = Place(location.name, offset, length)
    return places


def _bytes_of(tensor: onnx.TensorProto) -> int:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims) * dtype.itemsize)


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of the model, its own initializers first: those of attributes and of graphs
    inside of nodes too."""
    found: list[onnx.TensorProto] = []

    def visit(nodes: object) -> None:
        for node in nodes:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                found.extend([attribute.t, *attribute.tensors])
                for graph in (attribute.g, *attribute.graphs):
                    found.extend(graph.initializer)
                    visit(graph.node)

    found.extend(model.graph.initializer)
    visit(model.graph.node)
    for function in model.functions:
        visit(function.node)
    return found


def unusable(problem: str, value: object) -> EngineError:
    """The error for an engine folder that is damaged."""
    return EngineError(
        f"this engine folder cannot be used: {problem}",
        value=str(value),
        remedy="Build it again: hcma-fast build --out FOLDER --force.",
    )
