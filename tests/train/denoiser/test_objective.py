"""The objective of stage 2: what the denoiser sees, what it learns, parts of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hcma_fast.config import AlignmentSettings
from hcma_fast.losses import local_mean
from hcma_fast.models.checkpoint.folder import Components, load_components
from hcma_fast.schedule import alphas_cumprod
from hcma_fast.train.data.latent_cache import LatentCache
from hcma_fast.train.denoiser.objective import Conditioned, NoiseObjective
from hcma_fast.train.denoiser.settings import DenoiserTraining
from hcma_fast.train.denoiser.train import cached_captions
from hcma_fast.train.loop.stage import Stage, make_accelerator

from training_runs import one_thread

TRAINING = DenoiserTraining(batch=16, micro_batch=8, warmup=0)


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def make_objective(inputs: tuple[Path, ...], parts: Components, **changes: Any) -> NoiseObjective:
    cache, training = LatentCache(inputs[1]), TRAINING.model_copy(update=changes)
    captions = cached_captions(cache, inputs[2])
    return NoiseObjective(parts, cache, captions, training, torch.device("cpu"), lambda *_: None)


@pytest.fixture
def parts(random_checkpoint: Path) -> Components:
    """Loaded anew: they are trained."""
    return load_components(random_checkpoint)


def test_accumulation_has_the_gradient_of_the_larger_batch(
    inputs: tuple[Path, ...], parts: Components, tmp_path: Path
) -> None:
    objective = make_objective(inputs, parts)
    cache, training = LatentCache(inputs[1]), objective.training
    stage = Stage(cache, objective, training, make_accelerator(cpu=True), tmp_path)
    drawn: list[Conditioned] = []
    plain = objective.draw

    def draw(*arguments: Any) -> Conditioned:
        drawn.append(plain(*arguments))
        return drawn[-1]

    objective.draw = draw  # type: ignore[method-assign]
    before = [p.detach().clone() for p in objective.trained.parameters()]
    stage.step(0, stage.batches(0))
    found = [p.grad.clone() for p in objective.trained.parameters() if p.grad is not None]
    assert len(drawn) == 2 and len(found) == len(before)

    with torch.no_grad():
        for p, value in zip(objective.trained.parameters(), before, strict=True):
            p.copy_(value)
    names = ("z", "noise", "timesteps", "hidden", "boxes", "labels", "mask", "kept", "aligned")
    joined = {name: torch.cat([getattr(part, name) for part in drawn]) for name in names}
    objective.trained.zero_grad()
    losses, _ = objective.losses(objective.network, replace(drawn[0], **joined))
    assert len(losses) == 16
    losses.mean().backward()
    for p, gradient in zip(objective.trained.parameters(), found, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("trainable", "bf16"), [("fuser", False), ("fuser", True), ("all", False)])
def test_it_overfits_a_few_images(
    inputs: tuple[Path, ...], parts: Components, trainable: str, bf16: bool
) -> None:
    objective = make_objective(inputs, parts, trainable=trainable, bf16=bf16)
    drawn = objective.draw(LatentCache(inputs[1]).batch(np.arange(4)), 3)
    optimizer = torch.optim.AdamW(objective.trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = objective.losses(objective.network, drawn)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < (0.5 if trainable == "all" else 0.85) * losses[0]


def eps(objective: NoiseObjective, drawn: Conditioned) -> Tensor:
    with torch.no_grad():
        return objective.network(
            drawn.z, drawn.timesteps, drawn.hidden, drawn.boxes, drawn.labels,
            drawn.mask * drawn.kept,
        )  # fmt: skip


def test_what_the_denoiser_is_told(inputs: tuple[Path, ...], parts: Components) -> None:
    batch = LatentCache(inputs[1]).batch(np.arange(6), np.full(6, 0.9))
    told = make_objective(inputs, parts, drop_caption=0.0, drop_boxes=0.0)
    found = told.draw(batch, 1)
    # the captions are those whose pooled embeddings the cache has
    texts = [told.captions[i] for i in batch.caption_index.tolist()]
    ids = parts.tokenizer(texts, padding="max_length", max_length=77, truncation=True)
    output = parts.text_encoder(torch.tensor(ids.input_ids))
    torch.testing.assert_close(output.pooler_output, batch.caption, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.hidden, output.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert found.boxes.shape == (6, 30, 4) and found.mask.shape == (6, 30)
    assert torch.equal(found.mask.sum(1), batch.mask.sum(1)) and bool(found.kept.all())

    silent = make_objective(inputs, parts, drop_caption=1.0, drop_boxes=1.0)
    dropped = silent.draw(batch, 1)
    empty = parts.tokenizer([""], padding="max_length", max_length=77)
    expected = parts.text_encoder(torch.tensor(empty.input_ids)).last_hidden_state
    torch.testing.assert_close(dropped.hidden, expected.expand(6, -1, -1), atol=1e-6, rtol=1e-5)
    assert not dropped.kept.any()
    elsewhere = replace(dropped, boxes=dropped.boxes.flip(1), labels=dropped.labels + 1)
    assert torch.equal(eps(silent, dropped), eps(silent, elsewhere))
    assert not torch.equal(eps(told, found), eps(told, replace(found, boxes=found.boxes * 0.5)))
    # validation is told everything
    shown = silent.draw(batch, 1, torch.arange(6) * 100)
    assert bool(shown.kept.all()) and torch.equal(shown.hidden, found.hidden)
    # in training some are, some are not
    some = make_objective(inputs, parts, drop_caption=0.5, drop_boxes=0.5).draw(batch, 2)
    assert 0 < float(some.kept.sum()) < 6


@pytest.mark.parametrize("normalized", [False, True])
def test_latents_are_aligned_as_in_sampling(
    inputs: tuple[Path, ...], parts: Components, normalized: bool
) -> None:
    settings = AlignmentSettings(
        eta0=0.5, window=(0.2, 0.9), lambda_global=0.7, lambda_local=1.3, normalized=normalized
    )
    parts = replace(parts, settings=settings)
    batch = LatentCache(inputs[1]).batch(np.arange(5))
    times = torch.tensor([950, 700, 500, 100, 20])
    options = {"aligned_share": 1.0, "rates": "fixed"}
    objective = make_objective(inputs, parts, **options)
    plain = make_objective(inputs, parts, aligned_share=0.0).draw(batch, 1, times)
    found = objective.draw(batch, 1, times)
    # sampling begins with the noise: the first fifth and the last tenth of the steps are outside
    assert found.aligned.tolist() == [False, True, True, True, False]
    assert not plain.aligned.any() and torch.equal(plain.noise, found.noise)
    assert torch.equal(found.z[~found.aligned], plain.z[~found.aligned])
    assert not found.z.requires_grad

    leaf = plain.z.clone().requires_grad_()
    regions = parts.aligner.region_map(plain.boxes, plain.mask)
    losses = parts.aligner.losses(leaf, plain.caption, plain.labels, regions, plain.mask, times)
    objective_value = 0.7 * losses[0] + 1.3 * local_mean(losses[1], plain.mask)
    (gradient,) = torch.autograd.grad(objective_value.sum(), leaf)
    rate = 0.5 * (1 - alphas_cumprod()[times]).sqrt().float().view(-1, 1, 1, 1)
    if normalized:
        rate = rate * (plain.z.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)).view(
            -1, 1, 1, 1
        )
    expected = (plain.z - rate * gradient)[found.aligned]
    torch.testing.assert_close(found.z[found.aligned], expected, atol=1e-5, rtol=1e-4)
    # at random rates each goes its own part of twice that way
    loose = make_objective(inputs, parts, aligned_share=1.0, rates="uniform").draw(batch, 1, times)
    ways = (loose.z - plain.z).flatten(1).norm(dim=1) / (found.z - plain.z).flatten(1).norm(dim=1)
    inside = ways[found.aligned]
    assert bool((inside < 2).all()) and len(set(inside.tolist())) == 3
