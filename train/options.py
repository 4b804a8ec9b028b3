"""Options that the programs of `tiny`'s recipe share."""

from __future__ import annotations

import argparse
from pathlib import Path

from hcma_fast.errors import UsageError


def recipe_parser(
    description: str | None,
    *,
    steps: int,
    batch: int,
    scenes: int | None = None,
    lr: float | None = None,
) -> argparse.ArgumentParser:
    """``--out``, ``--steps`` and ``--batch``, and the others of these that have a default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(".runs/tiny"))
    parser.add_argument("--steps", type=positive, default=steps)
    parser.add_argument("--batch", type=positive, default=batch)
    if scenes is not None:
        parser.add_argument("--scenes", type=positive, default=scenes)
    if lr is not None:
        parser.add_argument("--lr", type=float, default=lr)
    return parser


def positive(text: str) -> int:
    """A whole number above 0; argparse makes a usage error of the ValueError."""
    value = int(text)
    if value <= 0:
        raise ValueError(text)
    return value


def check_batch(batch: int, scenes: int) -> None:
    """A step's scenes are all different.

    Raises:
        UsageError: there are fewer than the batch takes.
    """
    if batch > scenes:
        raise UsageError(
            f"a batch takes more scenes than the {scenes} that there are",
            value=batch,
            remedy="Lower --batch or raise --scenes.",
        )
