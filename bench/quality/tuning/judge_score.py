"""The judge's score of EmojiScenes' layouts under given settings, for ``bench.tune_alignment``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from hcma_fast.bench.quality.metrics.judge.model import CONFIDENCE_FLOOR, Judge
from hcma_fast.bench.quality.scene_images import generate_images
from hcma_fast.bench.quality.tuning.records import Readings
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import UsageError
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.train.data.emoji_scenes import sample_scene


class JudgeScore:
    """Per image how well the judge sees what was asked for, by each of the scores' names.

    Args:
        seed: layout i uses seed + i, whatever the settings are.
        min_side: smallest side of a large box, as a share of the image's.
        work: folder for the images of the setting at hand; emptied when it is finished.

    Raises:
        UsageError: the checkpoint does not draw EmojiScenes, all that the judge knows.
    """

    def __init__(
        self,
        pipe: HCMAPipeline,
        judge: Judge,
        *,
        seed: int,
        batch_size: int,
        num_inference_steps: int,
        work: Path,
        min_side: float = 0.25,
    ) -> None:
        check_emoji_scenes(pipe.preset)
        self._pipe, self._judge = pipe, judge
        self._seed, self._batch_size, self._steps = seed, batch_size, num_inference_steps
        self._work, self._min_side = work, min_side

    def __call__(self, settings: AlignmentSettings, start: int, stop: int) -> Readings:
        """Scores of the layouts start .. stop-1 of "val", (stop - start,).

        ``recognised`` is in [0, 1], NaN where no box is large; ``confidence`` is in
        [judge.CONFIDENCE_FLOOR, 0].
        """
        scenes = [sample_scene("val", index) for index in range(start, stop)]
        images = generate_images(
            self._pipe,
            scenes,
            "val",
            self._seed,
            self._batch_size,
            settings,
            self._steps,
            self._work,
            None,
            first=start,
        )
        seen = self._judge.log_probabilities(images, [[o.box for o in s.objects] for s in scenes])
        recognised, confidence = np.full((2, len(scenes)), np.nan)
        for i, (scene, values) in enumerate(zip(scenes, seen, strict=True)):
            wanted = [item.category for item in scene.objects]
            own = self._judge.of_categories(values, wanted)
            confidence[i] = np.maximum(own, CONFIDENCE_FLOOR).mean()
            x0, y0, x1, y1 = np.array([item.box for item in scene.objects]).T
            large = np.minimum(x1 - x0, y1 - y0) >= self._min_side
            if large.any():
                shown = [verdict.category for verdict in self._judge.verdicts([values])[0]]
                recognised[i] = (np.array(shown) == wanted)[large].mean()
        return {"recognised": recognised, "confidence": confidence}

    def forget(self) -> None:
        """Remove the images: finished settings need their scores only."""
        shutil.rmtree(self._work, ignore_errors=True)


def check_emoji_scenes(preset: str) -> None:
    """Refuse a checkpoint whose images the judge cannot read.

    Raises:
        UsageError: it does not draw EmojiScenes.
    """
    if preset != "tiny":
        raise UsageError(
            "alignment can be tuned for checkpoints of EmojiScenes (preset tiny) only: the judge "
            "knows no other images, and the aligner's own losses always fall with eta0",
            value=preset,
            remedy="Choose eta0 by eye: hcma-fast generate --eta0 ...",
        )
