"""Pack a training run as the embedded checkpoint: ``python -m hcma_fast.train.pack --help``.

Everything is stored as float16 safetensors, with hcma.json (the alignment's settings) and a list of
sha256 sums; the model card beside them is written by hand from the figures of the run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from hcma_fast.config import PRESETS, AlignmentSettings
from hcma_fast.export.manifest import hash_file
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint import CheckpointInfo, write_info
from hcma_fast.models.weights import load_components

SUMS_FILE = "sha256.txt"


def pack(run: Path, out: Path, settings: AlignmentSettings, image_size: int = 64) -> None:
    """Write the checkpoint ``out`` from the parts in ``run``, and load it once as a check.

    Raises:
        WeightsError: a part is missing or does not fit the others.
    """
    out.mkdir(parents=True, exist_ok=True)
    sharp = run / "vae-sharp"
    vae = AutoencoderKL.from_pretrained(sharp if sharp.is_dir() else run / "vae")
    unet = UNet2DConditionModel.from_pretrained(run / "unet")
    text_encoder = CLIPTextModel.from_pretrained(run / "text_encoder")
    for name, part in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
        part.half().save_pretrained(out / name)
    Aligner.from_pretrained(run / "aligner").save_pretrained(out / "aligner", dtype=torch.float16)
    shutil.copytree(run / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    write_info(out, CheckpointInfo(preset="tiny", image_size=image_size, alignment=settings))
    load_components(out)
    files = sorted(path for path in out.rglob("*.safetensors"))
    lines = [f"{hash_file(path)}  {path.relative_to(out).as_posix()}\n" for path in files]
    (out / SUMS_FILE).write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(".runs/tiny"))
    parser.add_argument("--out", type=Path, default=PRESETS["tiny"])
    parser.add_argument("--eta0", type=float, default=AlignmentSettings().eta0)
    parser.add_argument("--window", type=float, nargs=2, default=(0.0, 1.0))
    parser.add_argument("--lambda-global", type=float, default=1.0)
    parser.add_argument("--lambda-local", type=float, default=1.0)
    parser.add_argument("--normalized", action="store_true", help="eta is a share of the norm")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    args = parser.parse_args()
    settings = AlignmentSettings(
        eta0=args.eta0,
        window=tuple(args.window),
        lambda_global=args.lambda_global,
        lambda_local=args.lambda_local,
        normalized=args.normalized,
        guidance_scale=args.guidance_scale,
    )
    pack(args.run, args.out, settings)


if __name__ == "__main__":
    main()
