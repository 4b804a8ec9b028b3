"""Samples along the way: what they show, and that training does not notice them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hcma_fast.config import AlignerConfig
from hcma_fast.errors import InputError, WeightsError
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.train.aligner.settings import AlignerTraining
from hcma_fast.train.aligner.train import train_aligner
from hcma_fast.train.data.coco import read_split
from hcma_fast.train.data.latent_cache import read_header
from hcma_fast.train.data.views import crop_layout, part_of
from hcma_fast.train.loop.loop import LoopConfig
from hcma_fast.train.loop.loop import run as run_loop
from hcma_fast.train.loop.samples import SamplePlan, plan_samples, plan_scene_samples

CONFIG = AlignerConfig(
    latent_size=8, patch_size=2, token_width=16, width=32, depth=2, heads=2, text_width=16
)
#: 3 steps an epoch, 9 in all
TRAINING = AlignerTraining(
    epochs=3, batch=16, micro_batch=8, ema_decay=0.9, log_every=2, checkpoint_every=2
)


@pytest.fixture
def plan(random_components: Components, emoji_coco: Path, small_cache: Path) -> SamplePlan:
    found = plan_samples(random_components, emoji_coco, read_header(small_cache), 4, count=1)
    return replace(found, num_inference_steps=2)


def train(cache: Path, out: Path, samples: SamplePlan | None, stop: int | None = None) -> Path:
    def progress(done: int, total: int, record: object) -> None:
        if done == stop:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    return train_aligner(
        cache, out, TRAINING, Aligner(CONFIG), cpu=True, samples=samples, progress=progress
    )


def sheets(out: Path) -> dict[str, bytes]:
    folder = out / "aligner-run" / "samples"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_layouts_are_of_the_val_part(plan: SamplePlan, emoji_coco: Path) -> None:
    examples = [e for e in read_split(emoji_coco, "train") if part_of(e.image_id) == "val"]
    assert plan.captions == (examples[0].captions[0],)
    assert plan.layouts == (crop_layout(examples[0].layout, 24, 24),)


def test_a_sheet_shows_the_weights_and_leaves_the_generators_alone(
    plan: SamplePlan, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    aligner = Aligner(CONFIG).train()
    after_making = torch.get_rng_state()
    first = plan.draw(tmp_path / "a", 4, aligner=aligner)
    assert torch.equal(torch.get_rng_state(), after_making) and aligner.training
    assert all(p.requires_grad for p in aligner.parameters())
    assert first.name == "step-00000004.png"
    three = replace(plan, captions=plan.captions * 3, layouts=plan.layouts * 3)
    with Image.open(three.draw(tmp_path / "d", 4, aligner=aligner)) as sheet:
        # two columns of 512 pixels, two rows
        assert sheet.size == (1024, 1024)
    assert plan.draw(tmp_path / "b", 4, aligner=aligner).read_bytes() == first.read_bytes()
    torch.set_rng_state(before)
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.add_(0.5)
    assert plan.draw(tmp_path / "c", 4, aligner=aligner).read_bytes() != first.read_bytes()


def test_weights_that_diverge_draw_black_and_stop_nothing(plan: SamplePlan, tmp_path: Path) -> None:
    aligner = Aligner(CONFIG)
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.fill_(float("nan"))
    with Image.open(plan.draw(tmp_path, 2, aligner=aligner)) as sheet:
        colours = sheet.getcolors(1 << 20)
    assert colours is not None and max(colours)[1] == (0, 0, 0)


@pytest.mark.slow
def test_training_and_resuming_end_with_the_same_bits_with_samples_and_without(
    plan: SamplePlan, small_cache: Path, tmp_path: Path
) -> None:
    plain, drawn, resumed = (tmp_path / name for name in ("plain", "drawn", "resumed"))
    train(small_cache, plain, None)
    train(small_cache, drawn, plan)
    with pytest.raises(KeyboardInterrupt):
        train(small_cache, resumed, plan, stop=5)
    train(small_cache, resumed, plan)
    expected = load_file(plain / "aligner-last" / "model.safetensors")
    for out in (drawn, resumed):
        found = load_file(out / "aligner-last" / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert list(sheets(drawn)) == [f"step-{step:08d}.png" for step in (4, 8)]
    assert sheets(resumed) == sheets(drawn)
    # the weights move, and so do the pictures
    assert len(set(sheets(drawn).values())) == 2
    assert not (plain / "aligner-run" / "samples").exists()
    events = EventAccumulator(str(drawn / "aligner-run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [4, 8]


def test_the_denoisers_loop_does_not_notice_them_either(
    random_components: Components, tmp_path: Path
) -> None:
    plan = replace(plan_scene_samples(random_components, 2, count=1), num_inference_steps=2)
    ends = []
    for draw in (False, True):
        torch.manual_seed(0)
        unet = type(random_components.unet).from_config(random_components.unet.config)

        def loss(step: int, unet: torch.nn.Module = unet) -> dict[str, torch.Tensor]:
            # the global generator on purpose: samples must leave it alone too
            noise = torch.randn(())
            return {"loss": sum((p * noise).square().mean() for p in unet.parameters())}

        def sample(step: int, averaged: torch.nn.Module) -> None:
            if plan.due(step):
                plan.draw(tmp_path / "samples", step, unet=averaged)

        config = LoopConfig(steps=3, lr=0.01, ema_decay=0.5)
        out = tmp_path / str(draw)
        averaged = run_loop(unet, loss, config, out, on_step=sample if draw else None)
        ends.append((dict(unet.named_parameters()), dict(averaged.named_parameters())))
    for first, second in zip(*ends, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_samples_of_another_model_or_data_are_refused(
    random_components: Components, emoji_coco: Path, small_cache: Path, tmp_path: Path
) -> None:
    header = read_header(small_cache)
    other = header.model_copy(update={"vae_sha256": "0"})
    with pytest.raises(WeightsError, match="another model"):
        plan_samples(random_components, emoji_coco, other, 2)
    other = header.model_copy(update={"annotations_sha256": "0"})
    with pytest.raises(InputError, match="other annotations"):
        plan_samples(random_components, emoji_coco, other, 2)
    with pytest.raises(InputError, match="cannot read"):
        plan_samples(random_components, tmp_path, header, 2)
