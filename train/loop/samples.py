"""Pictures that a model in training draws of a few layouts, every so many steps.

They are for the eye alone. Training does not notice them: what is drawn with is a copy, and the
generators of random numbers are put back as they were.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn

from hcma_fast.errors import DivergenceError, InputError, WeightsError
from hcma_fast.files import make_folder, write_whole
from hcma_fast.layout import Layout
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.overlay import draw_layout
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.train.data.coco import read_split
from hcma_fast.train.data.coco_records import BadRecord
from hcma_fast.train.data.emoji_scenes import FIRST, Edition
from hcma_fast.train.data.encode import hash_annotations
from hcma_fast.train.data.encoders import made_with
from hcma_fast.train.data.latent_cache import CacheHeader
from hcma_fast.train.data.views import crop_layout, part_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COUNT = 4
"""Layouts of a sheet"""
STEPS = 20
"""PLMS steps: enough to see what changes"""
_COLUMNS = 2


@dataclass(frozen=True)
class SamplePlan:
    """What is drawn, and how often."""

    components: Components
    """the parts that are not trained, and stand-ins for the one that is"""
    captions: tuple[str, ...]
    layouts: tuple[Layout, ...]
    every: int
    """steps of training"""
    num_inference_steps: int = STEPS

    def due(self, step: int) -> bool:
        """Is there a sheet after this step?"""
        return step % self.every == 0

    def draw(
        self,
        folder: Path,
        step: int,
        *,
        aligner: Aligner | None = None,
        unet: UNet2DConditionModel | None = None,
        events: SummaryWriter | None = None,
    ) -> Path:
        """Write ``folder``/step-NNNNNNNN.png, the same for the same weights; a picture whose latent
        diverges is black.

        Args:
            aligner, unet: the weights to draw with, where they are not the components' own, in
                either mode; they are copied. All is drawn on their device.
            events: takes the sheet too.

        Raises:
            OutputError: it cannot be written.
        """
        parts, device = self.components, "cpu"
        for model in (aligner, unet):
            if model is not None:
                device = str(next(model.parameters()).device)
        if aligner is not None:
            parts = replace(parts, aligner=_frozen(aligner))
        if unet is not None:
            parts = replace(parts, unet=_frozen(unet))
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            pipe = HCMAPipeline.from_components(parts, device=device)
            pictures = [
                self._picture(pipe, caption, layout, seed)
                for seed, (caption, layout) in enumerate(
                    zip(self.captions, self.layouts, strict=True)
                )
            ]
        sheet = _sheet(pictures)
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        make_folder(folder)
        path = folder / f"step-{step:08d}.png"
        write_whole(path, lambda file: file.write(buffer.getvalue()))
        if events is not None:
            events.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        return path

    def _picture(self, pipe: HCMAPipeline, caption: str, layout: Layout, seed: int) -> Image.Image:
        try:
            steps = self.num_inference_steps
            image = pipe(caption, layout, seed=seed, num_inference_steps=steps).images[0]
        except DivergenceError:
            # so it is with weights that have just begun, and no reason to stop their training
            height, width = pipe.image_shape
            image = Image.new("RGB", (width, height))
        return draw_layout(image, layout)


def plan_samples(
    components: Components, data: Path, header: CacheHeader, every: int, count: int = COUNT
) -> SamplePlan:
    """The first layouts of the cache's val part, drawn by the model that the cache was made with.

    Args:
        data: the folder that the cache was made from: a cache has no texts.

    Raises:
        InputError: ``data`` cannot be read, is not the cache's, or has no image in the val part.
        WeightsError: the cache was made with other encoders than ``components`` has.
    """
    if not made_with(header, components):
        raise WeightsError(
            "samples cannot be drawn: the cache was made with another model",
            value=components.preset,
            remedy="Give the cache's model by --sample-model.",
        )
    skipped: list[BadRecord] | None = [] if header.skip_bad else None
    # reads before it hashes: a missing file is an error that says so
    # no image is opened, so that names may lead anywhere
    images = read_split(data, header.split, skipped=skipped, image_root=Path("/"))
    if hash_annotations(data, header.split) != header.annotations_sha256:
        raise InputError(
            "samples cannot be drawn: the cache was made from other annotations",
            value=str(data),
            remedy="Give the cache's data by --sample-data.",
        )
    examples = [example for example in images if part_of(example.image_id) == "val"]
    if not examples:
        raise InputError(
            "no image of the val part to draw samples of",
            value=str(data),
            remedy="Leave out --sample-every.",
        )
    chosen = examples[:count]
    return SamplePlan(
        components,
        tuple(e.captions[0] for e in chosen),
        tuple(crop_layout(e.layout, e.width, e.height, header.min_area) for e in chosen),
        every,
    )


def plan_scene_samples(
    components: Components, every: int, count: int = COUNT, edition: Edition = FIRST
) -> SamplePlan:
    """The first layouts of EmojiScenes' split "val"."""
    scenes = [edition.sample("val", index, edition.image_size) for index in range(count)]
    return SamplePlan(
        components,
        tuple(scene.captions[0] for scene in scenes),
        tuple(
            Layout([item.phrase for item in s.objects], [item.box for item in s.objects])
            for s in scenes
        ),
        every,
    )


_Module = TypeVar("_Module", bound=nn.Module)


def _frozen(model: _Module) -> _Module:
    """A copy that samples, whatever the model does meanwhile."""
    return copy.deepcopy(model).float().eval().requires_grad_(False)


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """In rows, each picture of the first one's size."""
    width, height = pictures[0].size
    columns = min(_COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (column * width, row * height))
    return sheet
