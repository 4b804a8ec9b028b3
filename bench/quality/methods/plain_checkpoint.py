"""Any SD 1.x folder for the methods that need neither gated layers nor an aligner.

The UNet gets GLIGEN's layers with their gates closed, as diffusers makes them, and the aligner is
a small random one: no method that this module allows ever runs either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from hcma_fast.bench.quality.methods.table import Method
from hcma_fast.config import AlignerConfig, AlignmentSettings
from hcma_fast.errors import UsageError, WeightsError
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.configs import read_config
from hcma_fast.models.checkpoint.folder import Components, trained_size
from hcma_fast.models.checkpoint.info import check_safe, hash_weights, resolve_folder
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer

_NEW_LAYERS = (".fuser.", "position_net.")


def lacks(folder: Path, aligner: Path | None) -> tuple[str, ...]:
    """What a folder is without, of "gates" and "aligner".

    Raises:
        WeightsError: the UNet's config is missing or damaged.
    """
    config = read_config("unet", folder / "unet" / "config.json")
    without = [] if config.get("attention_type") == "gated" else ["gates"]
    if aligner is None and not (folder / "aligner").is_dir():
        without.append("aligner")
    return tuple(without)


def check_methods(methods: Sequence[Method], without: Sequence[str], backend: str) -> None:
    """Refuse methods that would need what is not there.

    Raises:
        UsageError.
    """
    for method in methods:
        needs = "aligner" if method.name.startswith("hcma") else "gates"
        if method.grounded and (needs in without or "gates" in without):
            raise UsageError(
                f"this checkpoint has no {' and no '.join(without)}",
                value=method.label,
                remedy="Use sd, attend-and-excite, boxdiff or layout-guidance, or a GLIGEN "
                "checkpoint with --aligner.",
            )
    if backend != "eager":
        raise UsageError(
            f"a checkpoint without {' and '.join(without)} runs on eager only",
            value=backend,
            remedy="Add --backend eager.",
        )


def load_plain_components(name: str, aligner: Path | None = None) -> Components:
    """Load an SD 1.x or GLIGEN folder that lacks gates, an aligner, or both.

    Raises:
        WeightsError: missing, damaged, unsafe (pickles, remote code), or not of SD 1.x.
    """
    folder = resolve_folder(name, offline=False)
    check_safe(folder)
    unet = load_part(UNet2DConditionModel, folder / "unet")
    text_encoder = load_part(CLIPTextModel, folder / "text_encoder")
    vae = load_part(AutoencoderKL, folder / "vae")
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise WeightsError(
            "UNet and text encoder do not fit: this is not SD 1.x",
            value=(unet.config.cross_attention_dim, text_encoder.config.hidden_size),
            remedy="Use a folder of SD 1.4 or 1.5.",
        )
    if unet.config.attention_type != "gated":
        unet = with_closed_gates(unet)
    latent = trained_size(unet, folder / "unet")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    config = AlignerConfig(
        latent_channels=unet.config.in_channels,
        latent_size=latent,
        patch_size=4 if latent % 4 == 0 else 1,
        width=8,
        depth=1,
        heads=1,
        text_width=text_encoder.config.hidden_size,
    )
    components = Components(
        preset=Path(name).name,
        tokenizer=load_tokenizer(folder / "tokenizer"),
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        aligner=Aligner(config) if aligner is None else Aligner.from_pretrained(aligner),
        settings=AlignmentSettings(),
        image_size=latent * factor,
        # there may be no aligner to hash: a folder of the checkpoint stands in
        weights_hash=hash_weights(folder, aligner or folder / "unet"),
        source=folder,
    )
    for module in (text_encoder, unet, vae, components.own_aligner):
        module.eval().requires_grad_(False)
    return components


def with_closed_gates(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet, its weights shared, with gated layers whose gates are 0."""
    gated = UNet2DConditionModel.from_config({**unet.config, "attention_type": "gated"})
    report = gated.load_state_dict(unet.state_dict(), strict=False, assign=True)
    strange = [key for key in report.missing_keys if not any(new in key for new in _NEW_LAYERS)]
    if strange or report.unexpected_keys:
        raise WeightsError(
            "the UNet's weights are not those of its config",
            value=[*strange, *report.unexpected_keys][0],
            remedy="Download the checkpoint again.",
        )
    return gated
