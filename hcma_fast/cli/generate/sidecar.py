"""The JSON file beside each image: everything that is needed to make the image again."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcma_fast.cli.generate.jobs import STEM_BYTES, at, check_name, explain
from hcma_fast.config import MAX_SEED, AlignmentSettings
from hcma_fast.errors import InputError, WeightsError
from hcma_fast.files import parse_json, read_text
from hcma_fast.layout import Layout
from hcma_fast.sampling.savings import Savings

_VERSIONED = ("hcma-fast", "torch", "diffusers", "transformers")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FinalLosses(_Frozen):
    """The losses of the last step that computed the alignment, before its update."""

    loss_global: float
    loss_local: list[float]
    """one per box"""


class Sidecar(_Frozen):
    """How one image was made."""

    format: Literal[1] = 1
    image: str
    """name of the PNG file, beside this one"""
    image_sha256: str
    """of the PNG file"""
    prompt: str
    negative_prompt: str
    layout: Layout
    seed: int = Field(ge=0, le=MAX_SEED)
    num_inference_steps: int = Field(ge=2, le=999)
    settings: AlignmentSettings
    savings: Savings = Savings()
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

    def to_bytes(self) -> bytes:
        """JSON as it is written to the file."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    def check_weights(self, weights_hash: str) -> None:
        """Compare with the weights at hand.

        Raises:
            WeightsError: they are not the ones that made the image.
        """
        if weights_hash != self.weights_hash:
            raise WeightsError(
                "these weights did not make the image of the sidecar: their hash differs",
                value=weights_hash,
                remedy=f"Give the model with the hash {self.weights_hash} as --model.",
            )


def read_sidecar(path: Path) -> Sidecar:
    """A sidecar from its file.

    Raises:
        InputError: it cannot be read or is not a sidecar.
    """
    text = read_text(path, "the sidecar")
    data = at("not a sidecar of hcma-fast", parse_json, text, "it")
    try:
        sidecar = Sidecar.model_validate(data)
    except (ValidationError, TypeError) as error:  # TypeError: a layout without its keys
        problem = explain(error) if isinstance(error, ValidationError) else str(error)
        raise InputError(
            f"not a sidecar of hcma-fast: {problem}",
            value=str(path),
            remedy="Give the .json file that lies beside a generated image.",
        ) from error
    check_name(Path(sidecar.image).stem, STEM_BYTES)
    return sidecar


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
