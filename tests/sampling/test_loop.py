"""The sampler against a plain loop over diffusers' UNet and PNDMScheduler, and its rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from diffusers import PNDMScheduler
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH, AlignmentSettings
from hcma_fast.engine import Engine
from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.sampling.conditioning import Conditioning
from hcma_fast.sampling.loop import sample
from hcma_fast.sampling.schedule import Schedule, StepLosses, eta_table
from hcma_fast.sampling.solvers import plms
from hcma_fast.specs import GraphName, IOSpec

BATCH, STEPS = 2, 10


class Counting:
    """An engine that counts its calls."""

    def __init__(self, engine: Engine, name: str, calls: Counter[str]) -> None:
        self.engine, self.name, self.calls = engine, name, calls

    @property
    def spec(self) -> IOSpec:
        return self.engine.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls[self.name] += 1
        return self.engine(inputs)


@pytest.fixture(scope="module")
def engines(random_components: Components) -> dict[GraphName, Engine]:
    specs = random_components.specs()
    return {n: EagerEngine(m, specs[n]) for n, m in random_components.graphs().items()}


@pytest.fixture(scope="module")
def scene(random_components: Components) -> dict[str, Tensor]:
    """Random texts and boxes; image 0 has two boxes, image 1 none."""
    generator = torch.Generator().manual_seed(1)
    width = random_components.text_encoder.config.hidden_size
    corners = torch.rand(BATCH, MAX_OBJECTS, 2, 2, generator=generator)
    mask = torch.zeros(BATCH, MAX_OBJECTS)
    mask[0, :2] = 1
    return {
        "noise": torch.randn(BATCH, 4, 8, 8, generator=generator),
        "uncond": torch.randn(1, TOKEN_LENGTH, width, generator=generator).expand(BATCH, -1, -1),
        "cond": torch.randn(BATCH, TOKEN_LENGTH, width, generator=generator),
        "caption": torch.randn(BATCH, width, generator=generator),
        "labels": torch.randn(BATCH, MAX_OBJECTS, width, generator=generator),
        "boxes": torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1),
        "mask": mask,
    }


def condition(
    engines: Mapping[GraphName, Engine], scene: Mapping[str, Tensor], guided: bool
) -> Conditioning:
    fixed = {"boxes": scene["boxes"], "label_embeddings": scene["labels"]}
    cond = {"region_mask": scene["mask"], "encoder_hidden_states": scene["cond"]}
    null = {
        "region_mask": torch.zeros_like(scene["mask"]),
        "encoder_hidden_states": scene["uncond"],
    }
    halves = [
        engines["grounding"]({**fixed, **half}) for half in ([null, cond] if guided else [cond])
    ]
    text, objects = (
        torch.cat([half[name] for half in halves]) for name in ("text_context", "grounding_context")
    )
    states = [scene["uncond"], scene["cond"]] if guided else [scene["cond"]]
    return Conditioning(
        text,
        objects,
        scene["caption"],
        scene["labels"],
        halves[-1]["regions"],
        scene["mask"],
        scene["boxes"],
        torch.cat(states),
    )


def schedule(
    eta0: float, guidance: float = 3.0, beta: float = 1.0, window: tuple[float, float] = (0.0, 1.0)
) -> Schedule:
    settings = AlignmentSettings(eta0=eta0, window=window)
    table = plms(STEPS)
    return Schedule(table, eta_table(table, settings), (1.0, 0.5), guidance, beta)


@torch.no_grad()
def reference(
    parts: Components, scene: Mapping[str, Tensor], plan: Schedule, grounded_steps: int = STEPS
) -> tuple[Tensor, list[Tensor]]:
    """The same by diffusers: a UNet call per half, autograd for the alignment, PNDMScheduler."""
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    regions = parts.aligner.region_map(scene["boxes"], scene["mask"])
    z, losses = scene["noise"], []
    for k, t in enumerate(scheduler.timesteps):
        eta = float(plan.etas[k])
        # the scheduler ignores the sample of its second call, the corrector: it stored one
        if k != 1 and eta > 0:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                glob, local = parts.aligner.losses(
                    leaf, scene["caption"], scene["labels"], regions, scene["mask"]
                )
                mean = local.sum(-1) / scene["mask"].sum(-1).clamp(min=1)
                (grad,) = torch.autograd.grad((glob + 0.5 * mean).sum(), leaf)
            z = z - eta * grad
            losses.append(glob.detach())
        # the step that evaluation k belongs to, of which the corrector shares the first
        grounded = max(k - 1, 0) < grounded_steps
        noise = {}
        for half, mask in (("uncond", torch.zeros_like(scene["mask"])), ("cond", scene["mask"])):
            gligen = {
                "boxes": scene["boxes"],
                "positive_embeddings": scene["labels"],
                "masks": mask,
            }
            noise[half] = parts.unet(
                z,
                t,
                scene[half],
                cross_attention_kwargs={"gligen": gligen} if grounded else None,
            ).sample
        guided = noise["uncond"] + plan.guidance_scale * (noise["cond"] - noise["uncond"])
        z = scheduler.step(guided, t, z).prev_sample
    return z, losses


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_without_alignment_equals_diffusers_loop(
    engines: dict[GraphName, Engine], scene: dict[str, Tensor], random_components: Components
) -> None:
    plan = schedule(eta0=0.0)
    ours, losses = sample(engines, scene["noise"], condition(engines, scene, True), plan)
    expected, _ = reference(random_components, scene, plan)
    assert relative(ours, expected) < 1e-5
    assert losses == []


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.2, 0.7)])
def test_with_alignment_equals_diffusers_loop_with_autograd(
    engines: dict[GraphName, Engine],
    scene: dict[str, Tensor],
    random_components: Components,
    beta: float,
    window: tuple[float, float],
) -> None:
    plan = schedule(eta0=2.0, beta=beta, window=window)
    ours, losses = sample(engines, scene["noise"], condition(engines, scene, True), plan)
    expected, expected_losses = reference(
        random_components, scene, plan, grounded_steps=round(beta * STEPS)
    )
    assert relative(ours, expected) < 1e-5
    for mine, theirs in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(mine.loss_global, theirs, rtol=1e-4, atol=1e-6)
    unaligned, _ = sample(
        engines, scene["noise"], condition(engines, scene, True), schedule(eta0=0.0, beta=beta)
    )
    assert relative(ours, unaligned) > 1e-4, "the alignment must matter for this test to mean much"


@pytest.mark.parametrize(("beta", "grounded"), [(1.0, 11), (0.7, 8), (0.3, 4), (0.1, 2), (0.0, 0)])
def test_calls_each_engine_as_often_as_it_should(
    engines: dict[GraphName, Engine], scene: dict[str, Tensor], beta: float, grounded: int
) -> None:
    calls: Counter[str] = Counter()
    counting: dict[GraphName, Engine] = {n: Counting(e, n, calls) for n, e in engines.items()}
    conditioning = condition(engines, scene, True)
    _, losses = sample(counting, scene["noise"], conditioning, schedule(eta0=1.0, beta=beta))
    assert calls["align"] == STEPS, "once per PLMS step, not at the corrector"
    assert (calls["unet_grounded"], calls["unet_plain"]) == (grounded, STEPS + 1 - grounded)
    assert [entry.step for entry in losses] == list(range(STEPS))
    assert losses[0].timestep == 901 and losses[-1].timestep == 1


def test_losses_have_an_entry_per_box_and_none_for_padding(
    engines: dict[GraphName, Engine], scene: dict[str, Tensor]
) -> None:
    _, losses = sample(engines, scene["noise"], condition(engines, scene, True), schedule(eta0=1.0))
    first: StepLosses = losses[0]
    assert first.loss_global.shape == (BATCH,)
    assert first.loss_local.shape == (BATCH, MAX_OBJECTS)
    assert (first.loss_local[0, :2] > 0).all()
    assert first.loss_local[0, 2:].abs().max() == first.loss_local[1].abs().max() == 0


def test_guidance_one_is_the_conditional_half_alone(
    engines: dict[GraphName, Engine], scene: dict[str, Tensor]
) -> None:
    alone, _ = sample(
        engines, scene["noise"], condition(engines, scene, False), schedule(1.0, guidance=1.0)
    )
    both, _ = sample(
        engines, scene["noise"], condition(engines, scene, True), schedule(1.0, guidance=1.0)
    )
    assert relative(alone, both) < 1e-5


def test_the_hook_sees_every_evaluation_and_may_replace_the_latent(
    engines: dict[GraphName, Engine], scene: dict[str, Tensor]
) -> None:
    seen: list[int] = []

    def hook(k: int, z: Tensor) -> Tensor:
        seen.append(k)
        return torch.zeros_like(z) if k == STEPS else z

    conditioning = condition(engines, scene, True)
    z, _ = sample(engines, scene["noise"], conditioning, schedule(eta0=0.0), hook)
    assert seen == list(range(STEPS + 1))
    assert z.abs().max() == 0
