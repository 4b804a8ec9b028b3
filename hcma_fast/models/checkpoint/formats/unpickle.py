"""The program that reads a pickle: ``python -I unpickle.py SOURCE TARGET SIZE``.

It writes the tensors of SOURCE to TARGET as safetensors, and a JSON object on stdout: {} if it did,
else {"refused": why} with "code", the name of what the pickle would have called. It imports nothing
of hcma-fast.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save_file

_SPARE_BYTES = 2**30
"""Memory beside the weights"""
#: what training programs pickle beside the weights: objects that we read as nothing
_INERT_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
_INERT = {
    *("typing.Any", "builtins.dict", "builtins.list", "builtins.int", "builtins.float"),
    *("builtins.str", "builtins.bool", "builtins.tuple", "collections.defaultdict"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
}
#: entries of training, beside the model's
_SKIPPED = {
    *("optimizer", "optimizer_states", "opt", "lr_schedulers", "scheduler", "callbacks"),
    *("config_dict", "hyper_parameters", "hparams", "loops", "ema"),
}
_GLOBAL = re.compile(r"(?:GLOBAL|Unsupported (?:class|global):?|function|import)\s+`?([\w.]+)")
_DEEPEST = 8


class _Nothing:
    """Stands for an object of a training program; it takes whatever it is given, and keeps none."""

    def __new__(cls, *_: object, **__: object) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def append(self, _: object) -> None:
        """As a list."""

    def extend(self, _: object) -> None:
        """As a list."""

    def __hash__(self) -> int:
        return 0


def limit_memory(size: int) -> None:
    """Cap what this process may map and write, by the size of the file that it reads."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * size + _SPARE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + _SPARE_BYTES,) * 2)


def convert(source: str, target: str) -> dict[str, str]:
    """Read and write; see above for what comes back."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:
        unknown = []  # of torch before 1.6: not a zip, read without this list
    for name in unknown:
        if name not in _INERT and not name.startswith(_INERT_MODULES):
            return {"refused": "code", "code": name}
    inert: list[Any] = [(type("Nothing", (_Nothing,), {}), name) for name in unknown]
    try:
        with torch.serialization.safe_globals(inert):
            try:
                data = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                data = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        return {"refused": "it asks for more memory than its size accounts for"}
    except Exception as error:
        text = " ".join(str(error).split())
        match = _GLOBAL.search(text)
        if match is not None and "weights" in text.lower():
            return {"refused": "code", "code": match[1]}
        return {"refused": f"{type(error).__name__}: {text[:300]}"}
    tensors: dict[str, torch.Tensor] = {}
    for key, value in _tensors(data):
        tensors[key] = value.detach().to_dense().contiguous()
    if not tensors:
        return {"refused": "it holds no tensors"}
    save_file(_apart(tensors), target, {"format": "pt"})
    return {}


def _tensors(data: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by its path; of a training run's file the model alone."""
    if isinstance(data, torch.Tensor):
        yield prefix, data
    elif isinstance(data, Mapping) and depth < _DEEPEST:
        if depth == 0 and isinstance(data.get("state_dict"), Mapping):
            data = data["state_dict"]
        for key, value in data.items():
            if depth == 0 and key in _SKIPPED:
                continue
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share memory get copies: safetensors has no shared ones."""
    seen: set[int] = set()
    apart = {}
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[key] = value.clone() if place in seen else value
        seen.add(place)
    return apart


if __name__ == "__main__":
    limit_memory(int(sys.argv[3]))
    sys.stdout.write(json.dumps(convert(sys.argv[1], sys.argv[2])))
