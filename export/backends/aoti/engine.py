"""torch.compile's ahead-of-time kind (AOTInductor) as an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hcma_fast.errors import DeviceMemoryError
from hcma_fast.export.backends.aoti.build import gpu_misses, runner
from hcma_fast.opened import OpenedFile, private_folder
from hcma_fast.specs import IOSpec


class CompiledEngine:
    """Runs one .pt2 file of :func:`..build.compile_aoti`, on its device.

    Loading runs native code from the file, so the caller must have compared the sha256 of the
    opened file with the manifest's before. The file is not needed after that.

    It holds no state of a shape or a stream, so it has no :meth:`fork`: see the comment in
    :func:`runner`. On a GPU it must outlive the CUDA graphs that captured it, which read its
    weights and run its kernels.

    Raises:
        EngineError: the file cannot be read, or was compiled for another CPU, GPU or torch.
        DeviceMemoryError: the GPU has no memory left.
    """

    def __init__(self, source: Path | OpenedFile, spec: IOSpec) -> None:
        self.spec = spec
        self._run = _load(source, spec)
        self._misses = gpu_misses()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`hcma_fast.engine.Engine`.

        The outputs are new memory, the caller's; the captured sampler copies what it keeps.

        Raises:
            InputError: a tensor is not as the spec says; the native code trusts its inputs.
            DeviceMemoryError: the host or the device has no memory left.
        """
        try:
            return self._run(inputs)
        except RuntimeError as error:
            # on the CPU torch raises a plain RuntimeError
            # since the last error of this engine: one of others in between is taken for its own
            before, self._misses = self._misses, gpu_misses()
            missed = "allocate memory" in str(error) or self._misses > before
            if isinstance(error, torch.OutOfMemoryError) or missed:
                raise DeviceMemoryError(
                    f"out of memory in the graph {self.spec.graph}",
                    remedy="Generate fewer images at once.",
                ) from error
            raise


def _load(
    source: Path | OpenedFile, spec: IOSpec
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    if isinstance(source, Path):
        return runner(source, spec)
    # torch takes a path only, and one that ends in .pt2; it unpacks the file before it returns
    name = source.path.name
    with private_folder({name: source}, origin=source.path.parent) as folder:
        return runner(folder / name, spec)
