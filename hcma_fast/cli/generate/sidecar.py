"""The JSON file beside each image: everything that is needed to make the image again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hcma_fast.cli.generate.jobs import STEM_BYTES, at, check_name
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import HcmaError, InputError, WeightsError
from hcma_fast.files import parse_json, read_text
from hcma_fast.runtime.request import Request

_JSON = TypeAdapter(dict[str, Any])
FORMAT = 1
#: of format 1 from its beginning; what came later has the default that images had before
_ALWAYS_THERE = (
    *("prompt", "negative_prompt", "layout", "seed", "num_inference_steps"),
    "settings",
)
_VERSIONED = ("hcma-fast", "torch", "diffusers", "transformers")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FinalLosses(_Frozen):
    """The losses of the last step that computed the alignment, before its update."""

    loss_global: float
    loss_local: list[float]
    """one per box"""


class Origin(_Frozen):
    """What made an image, beside its request."""

    image: str
    """name of the PNG file, beside this one"""
    image_sha256: str
    """of the PNG file"""
    model: str
    """preset, hub id, or the absolute path of a folder or file"""
    aligner: str | None
    gligen: str | None = None
    vae: str | None = None
    clip_skip: int | None = None
    loras: tuple[str, ...] = ()
    """files, each with ``:SCALE``"""
    preset: str
    image_size: int
    height: int | None = None
    width: int | None = None
    precision: str | None = None
    """of a compiled backend; None for its default, or the engine folder's own"""
    backend: str
    grad_backend: str | None = None
    """what computed the alignment gradient; None: the backend"""
    cuda_graphs: bool = False
    device: str
    batch_size: int = Field(ge=1)
    """images that were computed together: it can change the last bit of a pixel"""
    weights_hash: str
    engine_hash: str | None
    versions: dict[str, str]
    losses: FinalLosses | None


@dataclass(frozen=True)
class Sidecar:
    """How one image was made."""

    request: Request
    """with all of its settings"""
    origin: Origin

    def as_json(self) -> dict[str, Any]:
        """The request's fields and the origin's, side by side."""
        origin = self.origin.model_dump(mode="json")
        head = {name: origin.pop(name) for name in ("image", "image_sha256")}
        return {"format": FORMAT, **head, **self.request.model_dump(mode="json"), **origin}

    def to_bytes(self) -> bytes:
        """JSON as it is written to the file."""
        return _JSON.dump_json(self.as_json(), indent=2) + b"\n"

    def check_weights(self, weights_hash: str) -> None:
        """Compare with the weights at hand.

        Raises:
            WeightsError: they are not the ones that made the image.
        """
        if weights_hash != self.origin.weights_hash:
            raise WeightsError(
                "these weights did not make the image of the sidecar: their hash differs",
                value=weights_hash,
                remedy=f"Give the model with the hash {self.origin.weights_hash} as --model.",
            )


def read_sidecar(path: Path, request_type: type[Request] = Request) -> Sidecar:
    """A sidecar from its file.

    Raises:
        InputError: it cannot be read, is not a sidecar, or is of another version's format.
    """
    text = read_text(path, "the sidecar")
    data = at("not a sidecar of hcma-fast", parse_json, text, "it")
    _check_format(data, path)
    try:
        sidecar = _parse(data, request_type)
    except (ValidationError, HcmaError) as error:
        problem = error.what if isinstance(error, HcmaError) else _explain(error)
        raise InputError(
            f"not a sidecar of hcma-fast: {problem}",
            value=str(path),
            remedy="Give the .json file that lies beside a generated image.",
        ) from error
    check_name(Path(sidecar.origin.image).stem, STEM_BYTES)
    return sidecar


def _check_format(data: object, path: Path) -> None:
    found = data.get("format", FORMAT) if isinstance(data, dict) else FORMAT
    if found != FORMAT and not isinstance(found, int):
        raise InputError(
            "not a sidecar of hcma-fast: its format is no number",
            value=found,
            remedy="Give the .json file that lies beside a generated image.",
        )
    if found != FORMAT:
        age = "an older" if found < FORMAT else "a newer"
        raise InputError(
            f"this sidecar was built by {age} version of hcma-fast: its format is {found}, not "
            f"{FORMAT}",
            value=str(path),
            remedy="Build the image again from its prompt and boxes, or use that version.",
        )


def _parse(data: Any, request_type: type[Request]) -> Sidecar:
    """The two parts of a sidecar.

    Raises:
        ValidationError, HcmaError: a field is missing, unknown, or of a wrong type.
    """
    if not isinstance(data, dict):
        raise InputError("it is no JSON object", value=data, remedy="Give a sidecar.")
    fields = request_type.model_fields
    asked = {name: value for name, value in data.items() if name in fields}
    rest = {n: v for n, v in data.items() if n not in fields and n != "format"}
    origin = Origin.model_validate(rest)
    for name in _ALWAYS_THERE:
        if name not in asked:
            raise InputError(f"{name} is missing", remedy="Give a whole sidecar.")
    if isinstance(asked["settings"], Mapping):
        # all of them: one that an older version did not have is its default, not the checkpoint's
        asked["settings"] = AlignmentSettings.model_validate(asked["settings"])
    return Sidecar(request_type(**asked), origin)


def _explain(error: ValidationError) -> str:
    """The first problem that pydantic found, in one clause."""
    first = error.errors()[0]
    return ": ".join([*(str(part) for part in first["loc"]), first["msg"]])


_RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}


def current_versions(backend: str) -> dict[str, str]:
    """Versions of what computes the image, from the packages' metadata."""
    names = (*_VERSIONED, *_RUNTIMES.get(backend, ()))
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
