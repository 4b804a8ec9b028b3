"""Images that an earlier run left: which of the wanted ones are there, whole and the same."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hcma_fast.cli.generate.jobs import Job
from hcma_fast.cli.generate.sidecar import Sidecar, read_sidecar
from hcma_fast.errors import HcmaError, InputError, OutputError
from hcma_fast.files import is_file, read_file

_STEM = re.compile(r"(?P<name>.+)-(?P<seed>\d{1,20})\.json")
_IMAGE_BYTES = 2**30
#: what an earlier image must share besides its request; devices and versions may differ
SAME_SETTINGS = (
    *("num_inference_steps", "settings", "savings", "weights_hash", "height", "width"),
    *("precision", "backend", "grad_backend"),
)


@dataclass(frozen=True)
class Finished:
    """An image that need not be made again."""

    job: Job
    """with the seed of the files"""
    record: Sidecar


def find_finished(
    jobs: Sequence[Job], folder: Path, settings: Mapping[str, Any], *, force: bool = False
) -> list[Finished | None]:
    """For each job the image in ``folder`` that it asks for, or None if it must be made.

    An image counts if its sidecar describes the same request and settings, and its file has the
    sidecar's hash. A job with a drawn seed takes an image of any seed that no other job has.

    Args:
        settings: of the run, with all of ``SAME_SETTINGS``, by the sidecar's names.
        force: an image of other settings is made again, instead of refused.

    Raises:
        OutputError: under a job's name lies an image of other settings, or no sidecar.
    """
    taken = {job.stem for job in jobs if not job.drawn}
    seeds = _seeds_by_name(folder) if any(job.drawn for job in jobs) else {}
    found: list[Finished | None] = []
    for job in jobs:
        if not job.drawn:
            found.append(_of_seed(job, folder, settings, force))
            continue
        candidates = (
            replace(job, seed=seed, stem=f"{job.name}-{seed}") for seed in seeds.get(job.name, ())
        )
        match = next(_matching(candidates, taken, folder, settings), None)
        if match is not None:
            taken.add(match.job.stem)
        found.append(match)
    return found


def _matching(
    candidates: Iterator[Job], taken: set[str], folder: Path, settings: Mapping[str, Any]
) -> Iterator[Finished]:
    for job in candidates:
        if job.stem in taken:
            continue
        try:
            match = _of_seed(job, folder, settings, force=False)
        except OutputError:
            continue  # of another run: its name does not stand in the way of a drawn seed
        if match is not None:
            yield match


def _of_seed(job: Job, folder: Path, settings: Mapping[str, Any], force: bool) -> Finished | None:
    image, sidecar, _ = job.files(folder)
    # the sidecar is written last: without it the image is of an interrupted run
    if not os.path.lexists(sidecar):
        return None
    try:
        record = read_sidecar(sidecar)
    except HcmaError as error:
        if force:
            return None
        raise OutputError(
            "this file is in the way, and is no sidecar that can be read",
            value=str(sidecar),
            remedy="Move it away, use --force to replace it, or use another --out.",
        ) from error
    different = _difference(job, record, settings)
    if different and not force:
        raise OutputError(
            f"the image exists already, with another {different}",
            value=str(image),
            remedy="Use --force to make it again, or another --out.",
        )
    if different or not _is_whole(image, record):
        return None
    return Finished(job, record)


def _difference(job: Job, record: Sidecar, settings: Mapping[str, Any]) -> str | None:
    """The first field in which the earlier image differs from what is asked for."""
    wanted = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "layout": job.layout,
        "seed": job.seed,
        **{name: settings[name] for name in SAME_SETTINGS},
    }
    return next((name for name, value in wanted.items() if getattr(record, name) != value), None)


def _is_whole(image: Path, record: Sidecar) -> bool:
    if image.name != record.image or not is_file(image):
        return False
    try:
        content = read_file(image, "the image", limit=_IMAGE_BYTES)
    except InputError:
        return False
    return hashlib.sha256(content).hexdigest() == record.image_sha256


def _seeds_by_name(folder: Path) -> dict[str, list[int]]:
    """Seeds of the sidecars in ``folder`` by the rest of their names, lowest first."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for name in sorted(os.listdir(folder)):
        if match := _STEM.fullmatch(name):
            found[match["name"]].append(int(match["seed"]))
    return {name: sorted(seeds) for name, seeds in found.items()}
