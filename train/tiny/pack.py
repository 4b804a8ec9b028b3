"""Pack a training run as the embedded checkpoint: ``python -m hcma_fast.train.tiny.pack --help``.

Everything is stored as float16 safetensors, with hcma.json (the alignment's settings) and a list of
sha256 sums; the model card beside them is written by hand from the figures of the run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pydantic import ValidationError
from transformers import CLIPTextModel

from hcma_fast.config import PRESETS, AlignmentSettings
from hcma_fast.errors import UsageError
from hcma_fast.export.manifest import hash_file
from hcma_fast.files import make_folder, write_folder, write_whole
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import load_components
from hcma_fast.models.checkpoint.info import CheckpointInfo, write_info
from hcma_fast.models.checkpoint.json_files import first_line
from hcma_fast.models.checkpoint.parts import load_part, quiet_transformers
from hcma_fast.program import run_program
from hcma_fast.train.data.editions import EDITIONS

SUMS_FILE = "sha256.txt"


def pack(run: Path, out: Path, settings: AlignmentSettings, image_size: int = 64) -> None:
    """Write the checkpoint ``out`` from the parts in ``run``, and load it once as a check.

    Raises:
        WeightsError: a part is missing or does not fit the others.
        OutputError: ``out`` cannot be written, or the disk is full.
    """
    make_folder(out)
    sharp = run / "vae-sharp"
    vae = load_part(AutoencoderKL, sharp if sharp.is_dir() else run / "vae")
    unet = load_part(UNet2DConditionModel, run / "unet")
    text_encoder = load_part(CLIPTextModel, run / "text_encoder")
    for name, part in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
        with quiet_transformers():
            write_folder(out / name, part.half().save_pretrained)
    Aligner.from_pretrained(run / "aligner").save_pretrained(out / "aligner", dtype=torch.float16)
    shutil.copytree(run / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    write_info(out, CheckpointInfo(preset="tiny", image_size=image_size, alignment=settings))
    load_components(out)
    files = sorted(path for path in out.rglob("*.safetensors"))
    lines = [f"{hash_file(path)}  {path.relative_to(out).as_posix()}\n" for path in files]
    write_whole(out / SUMS_FILE, lambda file: file.write("".join(lines).encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(".runs/tiny"))
    parser.add_argument("--out", type=Path, default=PRESETS["tiny"])
    parser.add_argument("--eta0", type=float, default=AlignmentSettings().eta0)
    parser.add_argument("--window", type=float, nargs=2, default=(0.0, 1.0))
    parser.add_argument("--lambda-global", type=float, default=1.0)
    parser.add_argument("--lambda-local", type=float, default=1.0)
    parser.add_argument("--normalized", action="store_true", help="eta is a share of the norm")
    parser.add_argument("--edition", type=int, choices=sorted(EDITIONS), default=1)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    args = parser.parse_args()
    try:
        settings = AlignmentSettings(
            eta0=args.eta0,
            window=tuple(args.window),
            lambda_global=args.lambda_global,
            lambda_local=args.lambda_local,
            normalized=args.normalized,
            guidance_scale=args.guidance_scale,
        )
    except ValidationError as error:
        raise UsageError(
            f"the alignment cannot have these settings: {first_line(error)}",
            remedy="See python -m hcma_fast.train.tiny.pack --help.",
        ) from error
    pack(args.run, args.out, settings, EDITIONS[args.edition].image_size)


if __name__ == "__main__":
    sys.exit(run_program(main))
