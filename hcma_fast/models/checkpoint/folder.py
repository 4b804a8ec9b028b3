"""Load a checkpoint into its components, and hand these out as the six graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from hcma_fast.config import TOKEN_LENGTH, AlignmentSettings
from hcma_fast.errors import InputError, WeightsError
from hcma_fast.models.aligner import Aligner, AlignStep
from hcma_fast.models.checkpoint.info import (
    PARTS,
    CheckpointInfo,
    check_safe,
    first_line,
    hash_weights,
    read_info,
    resolve_folder,
)
from hcma_fast.models.text import TextEncoder
from hcma_fast.models.unet import GroundedUNet, Grounding, PlainUNet, context_widths
from hcma_fast.specs import (
    ANY_BATCH,
    GRAPH_NAMES,
    BatchRange,
    GraphName,
    IOSpec,
    graph_specs,
)

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "Components",
    "ModelSource",
    "VAEDecoder",
    "load_components",
    "load_part",
    "load_tokenizer",
    "locate",
]


class VAEDecoder(nn.Module):
    """The `vae_decoder` graph: undo the latent's scaling and decode."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, z: Tensor) -> tuple[Tensor]:
        """z (B, 4, h, w) scaled latent -> image (B, 3, H, W) in [-1, 1]."""
        latent = (z / self.scaling_factor).to(self.vae.decoder.conv_in.weight.dtype)
        image: Tensor = self.vae.decode(latent, return_dict=False)[0]
        return (image.float().clamp(-1, 1),)


class ModelSource(Protocol):
    """What engines are built from: a loaded checkpoint, or one that is made up part by part."""

    @property
    def info(self) -> CheckpointInfo: ...
    @property
    def tokenizer(self) -> CLIPTokenizer: ...
    @property
    def weights_hash(self) -> str: ...
    def graph(
        self, name: GraphName, height: int | None = None, width: int | None = None
    ) -> nn.Module: ...
    def specs(
        self,
        height: int | None = None,
        width: int | None = None,
        batch: BatchRange | None = None,
    ) -> dict[GraphName, IOSpec]: ...
    def parameter_counts(self) -> dict[GraphName, int]: ...


@dataclass(frozen=True)
class Components:
    """All parts of one model, float32, frozen and in evaluation mode."""

    preset: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    aligner: Aligner
    settings: AlignmentSettings
    image_size: int
    """side of the square images that the model was trained at, in pixels"""
    weights_hash: str
    """sha256 of the files' contents, the same wherever the folder lies"""
    source: Path | None
    """folder that it was loaded from; None for made-up weights"""

    @property
    def info(self) -> CheckpointInfo:
        """What hcma.json holds, or would hold."""
        return CheckpointInfo(
            preset=self.preset, image_size=self.image_size, alignment=self.settings
        )

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def side_multiple(self) -> int:
        """Image sides must be multiples of this (design.md section 2)."""
        unet_factor = 2 ** (len(self.unet.config.block_out_channels) - 1)
        return int(self.vae_factor * max(self.aligner.config.patch_size, unet_factor))

    def graph(
        self, name: GraphName, height: int | None = None, width: int | None = None
    ) -> nn.Module:
        """A graph as a module: positional inputs, a tuple of outputs, in its spec's order.

        Args:
            height, width: of the images, in pixels; default the trained size.
        """
        if name == "text_encoder":
            return TextEncoder(self.text_encoder)
        if name == "grounding":
            cell = self.vae_factor * self.aligner.config.patch_size
            sides = (height or self.image_size, width or self.image_size)
            return Grounding(self.unet, self.aligner, (sides[0] // cell, sides[1] // cell))
        if name == "align":
            return AlignStep(self.aligner, normalized=self.settings.normalized)
        if name == "vae_decoder":
            return VAEDecoder(self.vae)
        return (GroundedUNet if name == "unet_grounded" else PlainUNet)(self.unet)

    def graphs(
        self, height: int | None = None, width: int | None = None
    ) -> dict[GraphName, nn.Module]:
        """All six, see :meth:`graph`."""
        return {name: self.graph(name, height, width) for name in GRAPH_NAMES}

    def parameter_counts(self) -> dict[GraphName, int]:
        """Weights of each graph; the UNet graphs share theirs."""
        return {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in self.graphs().items()
        }

    def specs(
        self,
        height: int | None = None,
        width: int | None = None,
        batch: BatchRange | None = None,
    ) -> dict[GraphName, IOSpec]:
        """Signatures of the six graphs.

        Args:
            height, width: of the images, in pixels; default the trained size.
            batch: images at once; default any number.

        Raises:
            InputError: a side is not a multiple of :attr:`side_multiple`.
        """
        height = self.image_size if height is None else height
        width = self.image_size if width is None else width
        for side in (height, width):
            if side <= 0 or side % self.side_multiple:
                raise InputError(
                    f"image sides must be multiples of {self.side_multiple}",
                    value=side,
                    remedy=f"Use {self.image_size}, the size that this model was trained at.",
                )
        return graph_specs(
            latent_height=height // self.vae_factor,
            latent_width=width // self.vae_factor,
            text_width=self.text_encoder.config.hidden_size,
            context_width=sum(context_widths(self.unet)),
            patch_size=self.aligner.config.patch_size,
            vae_factor=self.vae_factor,
            latent_channels=self.vae.config.latent_channels,
            time_conditioned=self.aligner.config.time_conditioning != "none",
            batch=batch or ANY_BATCH,
        )


@dataclass(frozen=True)
class Checkpoint:
    """Where the files of a model lie; nothing is loaded yet."""

    folder: Path
    aligner_folder: Path

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of the files' contents, the same wherever the folder lies."""
        return hash_weights(self.folder, self.aligner_folder)


def locate(
    name_or_path: str | Path, *, aligner: str | Path | None = None, offline: bool = False
) -> Checkpoint:
    """Find a model and refuse what is incomplete or unsafe, without loading it.

    Args and errors: see :func:`load_components`.
    """
    folder = resolve_folder(name_or_path, offline=offline)
    check_safe(folder)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise WeightsError(
            f"the checkpoint lacks {', '.join(missing)}",
            value=str(folder),
            remedy=f"Give a folder in diffusers' layout, with {', '.join(PARTS)} and aligner.",
        )
    aligner_folder = Path(aligner) if aligner is not None else folder / "aligner"
    if not aligner_folder.is_dir():
        raise WeightsError(
            "the checkpoint has no aligner",
            value=str(aligner_folder),
            remedy="Pass the folder of one that was trained for this model as aligner=.",
        )
    check_safe(aligner_folder)
    return Checkpoint(folder, aligner_folder)


def load_components(
    name_or_path: str | Path | Checkpoint,
    *,
    aligner: str | Path | None = None,
    offline: bool = False,
) -> Components:
    """Load a model in float32, whatever precision it is stored in.

    Args:
        name_or_path: a preset (``tiny``), a folder in diffusers' layout, a hub id, or what
            :func:`locate` made of one.
        aligner: folder of the aligner, for a checkpoint that has none (a plain GLIGEN folder).
        offline: never ask the hub; use what its cache has.

    Raises:
        WeightsError: missing, damaged, unsafe (pickles, remote code), or of parts that do not fit.
    """
    checkpoint = (
        name_or_path
        if isinstance(name_or_path, Checkpoint)
        else locate(name_or_path, aligner=aligner, offline=offline)
    )
    folder = checkpoint.folder
    info = read_info(folder)
    unet = load_part(UNet2DConditionModel, folder / "unet")
    vae = load_part(AutoencoderKL, folder / "vae")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    components = Components(
        preset=info.preset if info else "sd14",
        tokenizer=load_tokenizer(folder / "tokenizer"),
        text_encoder=load_part(CLIPTextModel, folder / "text_encoder"),
        unet=unet,
        vae=vae,
        aligner=Aligner.from_pretrained(checkpoint.aligner_folder),
        settings=info.alignment if info else AlignmentSettings(),
        image_size=info.image_size if info else int(unet.config.sample_size * factor),
        weights_hash=checkpoint.weights_hash,
        source=folder,
    )
    _check_fit(components)
    for module in (components.text_encoder, unet, vae, components.aligner):
        module.eval().requires_grad_(False)
    return components


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from tokenizer.json, or vocab.json and merges.txt.

    Raises:
        WeightsError: neither is there, or they are damaged.
    """
    legacy = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    try:
        if not legacy and not (folder / "tokenizer.json").is_file():
            # transformers would return a tokenizer without a vocabulary
            raise FileNotFoundError("no vocabulary in this folder")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception
        raise WeightsError(
            f"cannot load the tokenizer: {first_line(error)}",
            value=str(folder),
            remedy="It needs tokenizer.json, or vocab.json and merges.txt.",
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports of transformers: what matters becomes a WeightsError."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_part(cls: Any, folder: Path) -> Any:
    """One part in float32; refuses what the libraries only warn of, above all missing weights.

    Args:
        cls: its class in diffusers or transformers; folder: of this part.

    Raises:
        WeightsError: it is missing, damaged, or lacks weights.
    """
    names = {path.name for path in folder.glob("*.safetensors")}
    half_only = bool(names) and all(".fp16." in name for name in names)
    dtype_name = "dtype" if cls is CLIPTextModel else "torch_dtype"
    try:
        with quiet_transformers():
            model, report = cls.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant="fp16" if half_only else None,
                **{dtype_name: torch.float32},
            )
    except Exception as error:  # diffusers and transformers raise many kinds for a damaged file
        raise WeightsError(
            f"cannot load {folder.name}: {first_line(error)}",
            value=str(folder),
            remedy="It is damaged or of another model: download or build the checkpoint again.",
        ) from error
    lost = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lost:
        raise WeightsError(
            f"{folder.name} lacks {len(lost)} weights, or has them in another shape: {lost[0]}",
            value=str(folder),
            remedy="Config and weights are of different models: get the checkpoint again.",
        )
    return model


def _check_fit(parts: Components) -> None:
    """Do the parts belong together? Each wrong pair is named, with what it would need."""
    aligner, text, unet = parts.aligner.config, parts.text_encoder.config, parts.unet.config
    if unet.attention_type != "gated":
        raise WeightsError(
            "the UNet has no gated attention, so boxes cannot ground it",
            value=unet.attention_type,
            remedy="Use a GLIGEN checkpoint such as masterful/gligen-1-4-generation-text-box.",
        )
    latent_size = parts.image_size // parts.vae_factor
    for what, value, expected in (
        ("the aligner's text width", aligner.text_width, text.hidden_size),
        ("the UNet's cross-attention width", unet.cross_attention_dim, text.hidden_size),
        ("the text encoder's length", text.max_position_embeddings, TOKEN_LENGTH),
        (
            "the aligner's latent channels",
            aligner.latent_channels,
            parts.vae.config.latent_channels,
        ),
        ("the UNet's latent channels", unet.in_channels, parts.vae.config.latent_channels),
        ("the aligner's latent size", aligner.latent_size, latent_size),
        ("the image size's remainder", parts.image_size % parts.side_multiple, 0),
        ("the tokenizer's vocabulary", max(len(parts.tokenizer), text.vocab_size), text.vocab_size),
    ):
        if value != expected:
            raise WeightsError(
                f"the parts of the checkpoint do not fit: {what} should be {expected}",
                value=value,
                remedy="Take all parts, the aligner included, from one model.",
            )
