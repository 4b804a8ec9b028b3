"""Load a checkpoint into its components, and hand these out as the six graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from hcma_fast.config import TOKEN_LENGTH, AlignmentSettings
from hcma_fast.errors import InputError, Remedy, WeightsError
from hcma_fast.models.aligner import Aligner, AlignStep
from hcma_fast.models.checkpoint.configs import PartName
from hcma_fast.models.checkpoint.formats.lora import fold_lora
from hcma_fast.models.checkpoint.formats.recognise import recognise
from hcma_fast.models.checkpoint.formats.single_file import is_harmless, refuse_unknown
from hcma_fast.models.checkpoint.info import (
    CheckpointInfo,
    check_parts,
    read_info,
)
from hcma_fast.models.checkpoint.json_files import tell_once
from hcma_fast.models.checkpoint.located import Checkpoint, locate
from hcma_fast.models.checkpoint.options import ModelOptions, lora_file
from hcma_fast.models.checkpoint.parts import PART_CLASSES, make_part, tell_unused
from hcma_fast.models.checkpoint.state_hash import encoder_hashes
from hcma_fast.models.checkpoint.tokenizer import clip_tokenizer, load_tokenizer
from hcma_fast.models.text import TextEncoder
from hcma_fast.models.unet import GroundedUNet, PlainUNet, context_widths, grounding_graph
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
        """z (B, 4, h, w) scaled latent -> image (B, 3, H, W), nominally in [-1, 1].

        Not clamped: infinity would become white, and NaN a number in some engines.
        """
        latent = (z / self.scaling_factor).to(self.vae.decoder.conv_in.weight.dtype)
        image: Tensor = self.vae.decode(latent, return_dict=False)[0]
        return (image.float(),)


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
    aligner: Aligner | None
    """None for a model that comes without: it aligns nothing"""
    settings: AlignmentSettings
    """as the checkpoint has them; see :attr:`info` for what the parts at hand can do of them"""
    image_size: int
    """side of the square images that the model was trained at, in pixels"""
    weights_hash: str
    """sha256 of the files' contents, the same wherever the folder lies"""
    source: Path | None
    """folder or file that it was loaded from; None for made-up weights"""
    clip_skip: int = 1
    """layers of the text encoder, counted from its end, from which captions are read"""

    @property
    def info(self) -> CheckpointInfo:
        """What hcma.json holds, or would hold, for the parts that are there."""
        off = {"eta0": 0.0} if self.aligner is None else {}
        off |= {} if self.gated else {"grounding_beta": 0.0}
        return CheckpointInfo(
            preset=self.preset,
            image_size=self.image_size,
            alignment=self.settings.model_copy(update=off),
            clip_skip=self.clip_skip,
        )

    @property
    def gated(self) -> bool:
        """Whether the UNet has GLIGEN's layers."""
        return bool(self.unet.config.attention_type == "gated")

    @property
    def own_aligner(self) -> Aligner:
        """The aligner of a model that must have one.

        Raises:
            WeightsError: it has none.
        """
        if self.aligner is None:
            raise WeightsError(
                "the checkpoint has no aligner",
                value=str(self.source),
                remedy=Remedy(
                    python="Pass the folder of one that was trained for this model as aligner=.",
                    command="Give the folder of one that was trained for it with --aligner.",
                ),
            )
        return self.aligner

    @property
    def patch_size(self) -> int:
        """Latent cells along a side of the aligner's patches; 1 without an aligner."""
        return self.aligner.config.patch_size if self.aligner is not None else 1

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def side_multiple(self) -> int:
        """Image sides must be multiples of this (design.md section 2)."""
        unet_factor = 2 ** (len(self.unet.config.block_out_channels) - 1)
        return int(self.vae_factor * max(self.patch_size, unet_factor))

    def graph(
        self, name: GraphName, height: int | None = None, width: int | None = None
    ) -> nn.Module:
        """A graph as a module: positional inputs, a tuple of outputs, in its spec's order.

        Args:
            height, width: of the images, in pixels; default the trained size.
        """
        if name == "text_encoder":
            return TextEncoder(self.text_encoder, self.clip_skip)
        if name == "grounding":
            cell = self.vae_factor * self.patch_size
            sides = (height or self.image_size, width or self.image_size)
            grid = (sides[0] // cell, sides[1] // cell)
            return grounding_graph(self.unet, self.aligner, grid)
        if name == "align":
            return AlignStep(self.own_aligner, normalized=self.settings.normalized)
        if name == "vae_decoder":
            return VAEDecoder(self.vae)
        return (GroundedUNet if name == "unet_grounded" else PlainUNet)(self.unet)

    def graphs(
        self, height: int | None = None, width: int | None = None
    ) -> dict[GraphName, nn.Module]:
        """All that the model has, see :meth:`graph`."""
        there = self.specs(height, width)
        return {name: self.graph(name, height, width) for name in GRAPH_NAMES if name in there}

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
        """Signatures of the graphs that the model has.

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
            patch_size=self.patch_size,
            vae_factor=self.vae_factor,
            latent_channels=self.vae.config.latent_channels,
            time_conditioned=(
                self.aligner is not None and self.aligner.config.time_conditioning != "none"
            ),
            aligned=self.aligner is not None,
            grounded=self.gated,
            batch=batch or ANY_BATCH,
        )


@neutral_torch()
def load_components(
    name_or_path: str | Path | Checkpoint,
    *,
    aligner: str | Path | None = None,
    options: ModelOptions | None = None,
    offline: bool = False,
) -> Components:
    """Load a model in float32, whatever precision it is stored in.

    Args:
        name_or_path: a preset (``tiny``), a folder in diffusers' layout, a single file, a hub id
            (with ``@revision``), or what :func:`locate` made of one.
        aligner: folder of the aligner, for a checkpoint that has none (a plain GLIGEN folder).
        options: GLIGEN's layers or a VAE from files of their own, and ``clip_skip``.
        offline: never ask the hub; use what its cache has.

    Raises:
        WeightsError: missing, damaged, unsafe (pickles, remote code), or of parts that do not fit.
    """
    checkpoint = locate(name_or_path, aligner=aligner, options=options, offline=offline)
    with checkpoint.opened() as (folder, aligner_folder):
        if (folder / "tokenizer").is_dir():
            check_parts(folder)
        components = _load(checkpoint, folder, aligner_folder)
    _check_fit(components)
    parts = (components.text_encoder, components.unet, components.vae, components.aligner)
    for module in filter(None, parts):
        module.eval().requires_grad_(False)
    _tell_missing(components)
    return components


def _tell_missing(parts: Components) -> None:
    """Say what a model cannot do that others can, and whether its aligner is of another one."""
    if parts.aligner is None:
        tell_once("note: this model has no aligner, so nothing is aligned (eta0 is 0)")
    elif (trained := parts.aligner.config).vae_sha256 is not None:
        found = encoder_hashes(parts.vae, parts.text_encoder, parts.tokenizer)
        names = ("VAE", "text encoder")
        pairs = zip(names, found, (trained.vae_sha256, trained.text_sha256), strict=True)
        if other := [name for name, ours, its in pairs if ours != its]:
            tell_once(
                f"note: the aligner was trained with another {' and '.join(other)} than this "
                "model's, or with the same one at another precision: compare images with eta0 0"
            )
    if not parts.gated:
        reader = "the alignment alone reads boxes" if parts.aligner else "boxes are refused"
        tell_once(f"note: this model has no GLIGEN layers, so {reader}")


def _load(checkpoint: Checkpoint, folder: Path, aligner_folder: Path | None) -> Components:
    """The parts from ``folder``, as they are."""
    info = read_info(folder)
    recognised = recognise(checkpoint, folder)
    made: dict[PartName, Any] = {}
    unknown = list(recognised.unknown)
    for part, cls in PART_CLASSES.items():
        model, unused = make_part(cls, recognised.plans[part], folder / part)
        if part in recognised.named:
            unknown += [key for key in unused if not is_harmless(key)]
        else:
            tell_unused(part, unused)
        rename(model, str(checkpoint.folder / part))
        made[part] = model
    refuse_unknown(unknown, checkpoint.folder)
    for number, lora in enumerate(checkpoint.options.loras):
        fold_lora(folder / lora_file(number), lora.scale, made)
    unet, vae = made["unet"], made["vae"]
    aligner = Aligner.from_pretrained(aligner_folder) if aligner_folder is not None else None
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    whole = (folder / "tokenizer").is_dir()
    latent_size = trained_size(unet, folder)
    if aligner is not None and not whole:
        latent_size = aligner.config.latent_size
    skip = checkpoint.options.clip_skip
    return Components(
        preset=info.preset if info else "sd14",
        tokenizer=load_tokenizer(folder / "tokenizer") if whole else clip_tokenizer(),
        text_encoder=made["text_encoder"],
        unet=unet,
        vae=vae,
        aligner=aligner,
        settings=info.alignment if info else AlignmentSettings(),
        image_size=info.image_size if info else latent_size * factor,
        weights_hash=checkpoint.weights_hash,
        source=checkpoint.folder,
        clip_skip=skip if skip is not None else info.clip_skip if info else 1,
    )


def rename(model: Any, name: str) -> None:
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
    text, unet, channels = (
        parts.text_encoder.config,
        parts.unet.config,
        parts.vae.config.latent_channels,
    )
    pairs: list[tuple[str, object, object]] = []
    if parts.aligner is not None:
        aligner, latent_size = parts.aligner.config, parts.image_size // parts.vae_factor
        pairs += [
            ("the aligner's text width", aligner.text_width, text.hidden_size),
            ("the aligner's latent channels", aligner.latent_channels, channels),
            ("the aligner's latent size", aligner.latent_size, latent_size),
        ]
    pairs += [
        ("the UNet's cross-attention width", unet.cross_attention_dim, text.hidden_size),
        ("the text encoder's length", text.max_position_embeddings, TOKEN_LENGTH),
        ("the UNet's latent channels", unet.in_channels, channels),
        ("the image size's remainder", parts.image_size % parts.side_multiple, 0),
        ("the tokenizer's vocabulary", max(len(parts.tokenizer), text.vocab_size), text.vocab_size),
        ("the text encoder's end token", text.eos_token_id, _end_token(parts)),
    ]
    if unet.attention_type not in ("default", "gated"):
        raise WeightsError(
            "the UNet has another kind of grounding than GLIGEN's text and boxes",
            value=unet.attention_type,
            remedy="Use a GLIGEN checkpoint such as masterful/gligen-1-4-generation-text-box.",
        )
    for what, value, expected in pairs:
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
