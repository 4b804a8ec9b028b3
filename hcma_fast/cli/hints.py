"""What to say about options that ``hcma-fast generate`` does not have, but others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand

from hcma_fast.errors import UsageError

_SIZE = "The size is the model's, or that of hcma-fast build --height H --width W."
_HINTS = {
    ("--cfg", "--cfg-scale", "--guidance", "--scale"): "Use --guidance-scale.",
    ("--width", "--height", "--size", "-W", "-H"): _SIZE,
    ("--num-inference-steps", "--num-steps", "--ddim-steps"): "Use --steps.",
    ("--negative", "--neg-prompt", "-n"): "Use --negative-prompt.",
    ("--output", "--outdir", "--out-dir", "--output-dir", "-o"): "Use --out.",
    ("--n-samples", "--num-images-per-prompt", "--count", "--n"): "Use --num-images.",
    ("--bbox", "--boxes", "--bboxes", "--phrases"): "Use --box PHRASE:X0,Y0,X1,Y1.",
    ("--ckpt", "--checkpoint", "--model-id", "-m"): "Use --model.",
    ("--prompts", "--prompt-file", "--from-file"): "Use --input with a JSONL file.",
    ("--fp16", "--half"): "Use --precision float16.",
    ("--bf16",): "Use --precision bfloat16.",
    ("--gpu", "--cuda"): "Use --device cuda.",
    ("--cpu",): "Use --device cpu.",
    ("--batch",): "Use --batch-size.",
    ("--resume", "--continue"): "Use --skip-existing.",
    ("--overwrite",): "Use --force.",
    ("--scheduler", "--solver"): "Use --sampler.",
    ("--loras",): "Use --lora FILE:SCALE, once for each file.",
    ("--init-image", "--image", "--strength", "--mask", "--controlnet"): (
        "There is no such option: images are made from text and boxes alone."
    ),
}
_BY_OPTION = {option: hint for options, hint in _HINTS.items() for option in options}


class HintedCommand(TyperCommand):
    """Names the right option for a wrong one, and for a caption without ``--prompt``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments as typer reads them.

        Raises:
            UsageError: an option that is known from other programs, or a bare word.
        """
        known = {name for option in self.params for name in (*option.opts, *option.secondary_opts)}
        for word in args:
            name = word.partition("=")[0]
            if name not in known and name in _BY_OPTION:
                raise UsageError("no such option", value=name, remedy=_BY_OPTION[name])
        parse: Callable[[Any, list[str]], list[str]] = super().parse_args
        try:
            return parse(ctx, args)
        except Exception as error:
            # typer's own kinds are private; of a bare word it says this
            if "unexpected extra argument" not in str(error):
                raise
            raise UsageError(
                "there is a word that belongs to no option",
                value=str(error).rpartition("(")[2].rstrip(")"),
                remedy='Write a caption as --prompt "a dog".',
            ) from error
