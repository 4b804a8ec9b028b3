"""An ONNX graph and its weights as opened files, so that it is read from what was checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from hcma_fast.export.weights_file import graph_of, unusable, weight_places
from hcma_fast.opened import OpenedFile, private_folder


@dataclass(frozen=True)
class OnnxFile:
    """One graph; hold it as long as a library uses :meth:`arrays`."""

    graph: OpenedFile
    weights: Mapping[str, OpenedFile]
    """the files that its large weights lie in, by the names that the graph has for them"""

    @classmethod
    def open(cls, path: Path) -> OnnxFile:
        """The graph at ``path``.

        Raises:
            EngineError: it cannot be read, or takes weights from elsewhere than files beside it.
        """
        return cls.of(_opened(path), lambda name: _opened(path.with_name(name), follow=False))

    @classmethod
    def of(cls, graph: OpenedFile, beside: Callable[[str], OpenedFile | None]) -> OnnxFile:
        """A graph with the files that it names.

        Args:
            beside: gives the file of that name in the graph's folder; None where there is none.

        Raises:
            EngineError: as :meth:`open`.
        """
        weights: dict[str, OpenedFile] = {}

        def size_of(name: str) -> int | None:
            if name not in weights:
                file = beside(name)
                if file is None:
                    return None
                weights[name] = file
            return weights[name].size

        weight_places(graph_of(graph.content, graph.path), size_of)
        return cls(graph, weights)

    @property
    def path(self) -> Path:
        """Where the graph lay, for messages."""
        return self.graph.path

    def model(self) -> onnx.ModelProto:
        """The graph, without the weights in other files."""
        return graph_of(self.graph.content, self.path)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The weights in other files, by name, where they lie in memory: nothing is copied."""
        model = self.model()
        places = weight_places(model, lambda name: self.weights[name].size)
        found = {}
        for tensor in model.graph.initializer:
            if tensor.name not in places:
                continue
            place = places[tensor.name]
            content = self.weights[place.file].memory[place.offset : place.offset + place.length]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            found[tensor.name] = content.view(dtype).reshape(tuple(tensor.dims))
        return found

    @contextmanager
    def plain(self) -> Iterator[Path]:
        """The graph's path in a private folder of plain files, for libraries that take no other.

        Raises:
            OutputError: there is no room for it.
        """
        files = {**self.weights, self.path.name: self.graph}
        with private_folder(files, plain=True, origin=self.path.parent) as folder:
            yield folder / self.path.name


def _opened(path: Path, *, follow: bool = True) -> OpenedFile:
    try:
        return OpenedFile(path, follow=follow)
    except OSError as error:
        raise unusable(f"a file cannot be read ({error.strerror})", path) from error
