"""Load a checkpoint into its components, and hand these out as the six graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from hcma_fast.config import TOKEN_LENGTH, AlignmentSettings
from hcma_fast.errors import InputError, WeightsError
from hcma_fast.models.aligner import Aligner, AlignStep
from hcma_fast.models.checkpoint.info import (
    CheckpointInfo,
    check_parts,
    read_info,
)
from hcma_fast.models.checkpoint.located import Checkpoint, locate
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer
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
from hcma_fast.torch_state import neutral_torch

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "Components",
    "ModelSource",
    "VAEDecoder",
    "load_components",
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


@neutral_torch()
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
    checkpoint = locate(name_or_path, aligner=aligner, offline=offline)
    with checkpoint.opened() as (folder, aligner_folder):
        check_parts(folder)
        components = _load(checkpoint, folder, aligner_folder)
    _check_fit(components)
    for module in (
        components.text_encoder,
        components.unet,
        components.vae,
        components.aligner,
    ):
        module.eval().requires_grad_(False)
    return components


def _load(checkpoint: Checkpoint, folder: Path, aligner_folder: Path) -> Components:
    """The parts from ``folder``, as they are."""
    info = read_info(folder)
    unet = load_part(UNet2DConditionModel, folder / "unet")
    vae = load_part(AutoencoderKL, folder / "vae")
    text_encoder = load_part(CLIPTextModel, folder / "text_encoder")
    for part, model in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        _rename(model, str(checkpoint.folder / part))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return Components(
        preset=info.preset if info else "sd14",
        tokenizer=load_tokenizer(folder / "tokenizer"),
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        aligner=Aligner.from_pretrained(aligner_folder),
        settings=info.alignment if info else AlignmentSettings(),
        image_size=info.image_size if info else trained_size(unet, folder) * factor,
        weights_hash=checkpoint.weights_hash,
        source=checkpoint.folder,
    )


def _rename(model: Any, name: str) -> None:
    """Let the model's config say that it was loaded from ``name``: a saved config keeps it."""
    if isinstance(model, CLIPTextModel):
        model.config.name_or_path = name
    else:
        model.register_to_config(_name_or_path=name)


def trained_size(model: UNet2DConditionModel | AutoencoderKL, folder: Path) -> int:
    """``sample_size`` of a part's config, where there is no hcma.json to say the image size.

    Raises:
        WeightsError: the config does not have it.
    """
    size = model.config.sample_size
    if size is None:
        raise WeightsError(
            "neither hcma.json nor the part's config says at which size it was trained",
            value=str(folder),
            remedy="Write sample_size into its config.json: 64 for the UNet of SD 1.x, 512 for "
            "its VAE.",
        )
    return int(size)


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
        ("the text encoder's end token", text.eos_token_id, _end_token(parts)),
    ):
        if value != expected:
            raise WeightsError(
                f"the parts of the checkpoint do not fit: {what} should be {expected}",
                value=value,
                remedy="Take all parts, the aligner included, from one model.",
            )


def _end_token(parts: Components) -> int:
    """The id at which the text encoder should pool: that of the tokenizer's end token.

    An encoder that says 2 pools at the highest id of a text, as all of SD 1.x do.
    """
    end = int(parts.tokenizer.eos_token_id)
    legacy = parts.text_encoder.config.eos_token_id == 2 and end == len(parts.tokenizer) - 1
    return 2 if legacy else end
