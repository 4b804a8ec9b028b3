"""Find the safetensors files of a part, and read from them the weights that its model has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.json_files import files_in, first_line, open_file, shorten

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
_LISTED = 10


@dataclass(frozen=True)
class WeightFile:
    """A file that holds weights of a part, among others perhaps."""

    path: Path
    names: Mapping[str, str] | None = None
    """the part's weights, as the model calls them, by their keys in the file; None: all of them, by
    their own names"""


def weight_files(folder: Path) -> list[Path]:
    """The files of a part's weights: one, or all shards, of the variant that is most precise.

    Raises:
        WeightsError: there are none, or a shard is missing.
    """
    chosen = choose_files(folder, [path.name for path in files_in(folder)])
    return [folder / name for name in chosen]


def choose_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Of the files in a part's folder, those of :func:`weight_files`.

    Raises:
        WeightsError: see there.
    """
    variants: dict[str, list[tuple[str, re.Match[str]]]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            variant = match["variant"] or match["late_variant"] or ""
            variants.setdefault(variant, []).append((name, match))
    if not variants:
        raise _damaged(folder, "there is no file of weights in safetensors' format")
    order = sorted(variants, key=lambda name: (*(name != known for known in _PREFERRED), name))
    chosen = variants[order[0]]
    whole = [name for name, match in chosen if match["number"] is None]
    if whole:
        return whole[:1]
    count = int(chosen[0][1]["count"])
    shards = {int(match["number"]): name for name, match in chosen if int(match["count"]) == count}
    if len(shards) != count or set(shards) != set(range(1, count + 1)):
        raise _damaged(folder, f"{len(shards)} of {count} files of weights are there")
    return [shards[number] for number in sorted(shards)]


def read_weights(
    part: str,
    files: Sequence[WeightFile],
    shapes: Mapping[str, Sequence[int]],
    *,
    values: bool = True,
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a model as private copies in float32, and the keys that it does not have.

    Args:
        part: what it is, for errors; shapes: of the model's weights.
        values: False only looks at names and shapes, and returns no weights.

    Raises:
        WeightsError: a file is damaged, or a weight is missing, twice there, or of another shape
            or kind of number.
    """
    found: dict[str, tuple[Any, str]] = {}
    unused: list[str] = []
    folder = files[0].path.parent if files[0].names is None else files[-1].path
    with ExitStack() as stack, damage(part, folder):
        for weights in files:
            open_file(weights.path).close()
            # read, not mapped: a mapped file counts as memory beside the copies
            file = stack.enter_context(safe_open(weights.path, framework="pt", backend="pread"))
            names = weights.names
            for key in sorted(file.keys() if names is None else names):
                name = _current_name(key if names is None else names[key], shapes)
                if name not in shapes:
                    unused.append(key)
                elif name in found:
                    raise _damaged(folder, f"the weight {shorten(name)} is there twice")
                else:
                    found[name] = (file, key)
        _check_complete(part, found, shapes, folder)
        weights_of = {name: _read(*found[name], shapes[name]) for name in found if values}
    return weights_of, [key for key in unused if not key.endswith(_NO_WEIGHT)]


def _read(file: Any, key: str, shape: Sequence[int]) -> Tensor:
    # a copy: what is mapped would change with the file
    value: Tensor = file.get_tensor(key).to(torch.float32, copy=True)
    return value.reshape(tuple(shape))


def _check_complete(
    part: str,
    found: Mapping[str, tuple[Any, str]],
    shapes: Mapping[str, Sequence[int]],
    place: Path,
) -> None:
    missing = sorted(name for name in shapes if name not in found)
    wrong = [name for name in found if not _fits(found[name], shapes[name])]
    if not missing and not wrong:
        return
    problems = []
    if missing:
        problems.append(f"lacks {list_names(missing)}")
    if wrong:
        file, key = found[sorted(wrong)[0]]
        stored = file.get_slice(key)
        problems.append(
            f"has {len(wrong)} weights of another shape or kind of number, such as {shorten(key)}: "
            f"{stored.get_dtype()} {list(stored.get_shape())}, where the model has "
            f"{list(shapes[sorted(wrong)[0]])}"
        )
    raise WeightsError(
        f"{part} {' and '.join(problems)}",
        value=str(place),
        remedy="Config and weights, or base and adapter, are of different models: get the "
        "checkpoint again.",
    )


def list_names(names: Iterable[str]) -> str:
    """Count and first ten of some weights: ``12 weights: a, b, ...``."""
    listed = sorted(names)
    shown = ", ".join(shorten(name) for name in listed[:_LISTED])
    return f"{len(listed)} weights: {shown}{', ...' if len(listed) > _LISTED else ''}"


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


def _fits(place: tuple[Any, str], shape: Sequence[int]) -> bool:
    stored = place[0].get_slice(place[1])
    # LDM's VAE has convolutions of one cell where diffusers has products of matrices
    alike = list(stored.get_shape()) in (list(shape), [*shape, 1, 1], [*shape, 1])
    return alike and stored.get_dtype() in _DTYPES


def _damaged(folder: Path, problem: str, part: str | None = None) -> WeightsError:
    return WeightsError(
        f"cannot load {part or folder.name}: {problem}",
        value=str(folder),
        remedy="It is damaged or of another model: download or build the checkpoint again.",
    )
