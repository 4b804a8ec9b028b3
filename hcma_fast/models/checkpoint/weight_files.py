"""Find the safetensors files of a part, and read from them the weights that its model has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.info import first_line
from hcma_fast.models.checkpoint.json_files import files_in, open_file, shorten

_NAME = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?(?:\.(?P<late_variant>\w+))?\.safetensors"
)
_PREFERRED = ("", "fp32", "fp16", "bf16")
_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
#: how libraries have renamed weights since some checkpoints were written
_RENAMED = (
    ("text_model.", ""),
    *((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v.")),
    (".proj_attn.", ".to_out.0."),
)
_NO_WEIGHT = "position_ids"
"""End of a name that older files have and models make themselves"""


def weight_files(folder: Path) -> list[Path]:
    """The files of a part's weights: one, or all shards, of the variant that is most precise.

    Raises:
        WeightsError: there are none, or a shard is missing.
    """
    variants: dict[str, list[tuple[Path, re.Match[str]]]] = {}
    for path in files_in(folder):
        if match := _NAME.fullmatch(path.name):
            variant = match["variant"] or match["late_variant"] or ""
            variants.setdefault(variant, []).append((path, match))
    if not variants:
        raise _damaged(folder, "there is no file of weights in safetensors' format")
    order = sorted(variants, key=lambda name: (*(name != known for known in _PREFERRED), name))
    chosen = variants[order[0]]
    whole = [path for path, match in chosen if match["number"] is None]
    if whole:
        return whole[:1]
    count = int(chosen[0][1]["count"])
    shards = {int(match["number"]): path for path, match in chosen if int(match["count"]) == count}
    if len(shards) != count or set(shards) != set(range(1, count + 1)):
        raise _damaged(folder, f"{len(shards)} of {count} files of weights are there")
    return [shards[number] for number in sorted(shards)]


def read_weights(
    part: str, files: Sequence[Path], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a model as private copies in float32, and the names that it does not have.

    Args:
        part: what it is, for errors; shapes: of the model's weights.

    Raises:
        WeightsError: a file is damaged, or a weight is missing, twice there, or of another shape
            or kind of number.
    """
    found: dict[str, tuple[Any, str]] = {}
    unused: list[str] = []
    folder = files[0].parent
    with ExitStack() as stack, damage(part, folder):
        for path in files:
            open_file(path).close()
            file = stack.enter_context(safe_open(path, framework="pt"))
            for key in sorted(file.keys()):
                name = _current_name(key, shapes)
                if name not in shapes:
                    unused.append(key)
                elif name in found:
                    raise _damaged(folder, f"the weight {shorten(name)} is there twice")
                else:
                    found[name] = (file, key)
        wrong = [name for name, shape in shapes.items() if not _fits(found.get(name), shape)]
        if wrong:
            raise WeightsError(
                f"{part} lacks {len(wrong)} weights, or has them in another shape: "
                f"{shorten(sorted(wrong)[0])}",
                value=str(folder),
                remedy="Config and weights are of different models: get the checkpoint again.",
            )
        weights = {
            # a copy: what is mapped would change with the file
            name: file.get_tensor(key).to(torch.float32, copy=True)
            for name, (file, key) in found.items()
        }
    return weights, [key for key in unused if not key.endswith(_NO_WEIGHT)]


@contextmanager
def damage(part: str, folder: Path) -> Iterator[None]:
    """What a library raises inside becomes a WeightsError: they raise many kinds."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise _damaged(folder, first_line(error), part) from error


def _current_name(key: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """The model's name of a weight that a file calls ``key``."""
    if key in shapes:
        return key
    for old, new in _RENAMED:
        if old in key and (name := key.replace(old, new)) in shapes:
            return name
    return key


def _fits(place: tuple[Any, str] | None, shape: Sequence[int]) -> bool:
    if place is None:
        return False
    stored = place[0].get_slice(place[1])
    return list(stored.get_shape()) == list(shape) and stored.get_dtype() in _DTYPES


def _damaged(folder: Path, problem: str, part: str | None = None) -> WeightsError:
    return WeightsError(
        f"cannot load {part or folder.name}: {problem}",
        value=str(folder),
        remedy="It is damaged or of another model: download or build the checkpoint again.",
    )
