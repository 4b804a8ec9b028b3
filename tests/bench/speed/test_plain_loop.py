"""The yardstick computes what our eager pipeline computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.bench.speed.harness.plain_loop import plain_generate
from hcma_fast.models.checkpoint.folder import Components

LAYOUTS = [
    Layout(["dog", "pizza"], [(0.05, 0.3, 0.45, 0.9), (0.5, 0.5, 0.95, 0.9)]),
    Layout.empty(),
]
PROMPTS = ["a dog beside a pizza", "a cat"]


@pytest.mark.parametrize(
    "changes",
    [{"eta0": 2.0}, {"eta0": 0.0}, {"eta0": 2.0, "grounding_beta": 0.5, "window": (0.2, 0.7)}],
)
def test_equals_the_eager_pipeline(random_components: Components, changes: dict[str, Any]) -> None:
    changed = {"lambda_local": 0.5, "guidance_scale": 3.0, **changes}
    settings = random_components.settings.model_copy(update=changed)
    images, latents = plain_generate(
        random_components, PROMPTS, LAYOUTS, [4, 5], num_inference_steps=6, settings=settings
    )
    ours = HCMAPipeline.from_components(random_components)(
        PROMPTS,
        LAYOUTS,
        seed=4,
        num_inference_steps=6,
        eta0=settings.eta0,
        lambda_local=settings.lambda_local,
        guidance_scale=settings.guidance_scale,
        grounding_beta=settings.grounding_beta,
        align_window=settings.window,
    )
    assert (latents - ours.latents).norm() / ours.latents.norm() < 1e-5
    for plain, image in zip(images, ours.images, strict=True):
        # a value near .5 may round either way
        assert np.abs(np.asarray(plain, int) - np.asarray(image, int)).max() <= 1


def test_takes_the_checkpoints_settings_by_default(random_components: Components) -> None:
    arguments = (random_components, PROMPTS[:1], LAYOUTS[:1], [4])
    _, default = plain_generate(*arguments, num_inference_steps=4)
    ours = HCMAPipeline.from_components(random_components)(
        PROMPTS[0], LAYOUTS[0], seed=4, num_inference_steps=4, output_type="latent"
    )
    off = random_components.settings.model_copy(update={"eta0": 0.0})
    _, unaligned = plain_generate(*arguments, num_inference_steps=4, settings=off)
    assert (default - ours.latents).norm() / ours.latents.norm() < 1e-5
    assert (default - unaligned).norm() / unaligned.norm() > 1e-4
