"""Attention maps with gradients, the peers in the sampler, and where phrases stand in captions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as theirs,
)
from torch import Tensor

from hcma_fast import HCMAPipeline
from hcma_fast.bench.quality.items import EvalItem, emoji_items
from hcma_fast.bench.quality.methods.attend_and_excite import AttendAndExcite, RefinedUpdates
from hcma_fast.bench.quality.methods.attention import (
    AttentionUNet,
    attention_factors,
    choose_factor,
    mean_map,
)
from hcma_fast.bench.quality.methods.boxdiff import BoxDiff
from hcma_fast.bench.quality.methods.guidance import GuidanceStep
from hcma_fast.bench.quality.methods.layout_guidance import LayoutGuidance
from hcma_fast.bench.quality.methods.table import METHOD_NAMES, Method, Runner
from hcma_fast.bench.quality.methods.targets import Target, find_targets
from hcma_fast.config import PRESETS, AlignmentSettings
from hcma_fast.errors import InputError, UsageError
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer
from hcma_fast.models.unet import attention_blocks

TARGETS = (Target((2,), ((0.0, 0.0, 0.5, 0.5),)), Target((4, 5), ((0.5, 0.5, 1.0, 1.0),)))
ITEM = EvalItem(id="a", prompt="a dog", layout=Layout(["dog"], [(0.1, 0.1, 0.6, 0.9)]))
PEERS = ("attend-and-excite", "boxdiff", "layout-guidance")


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)


def context(unet: Any, states: Tensor) -> Tensor:
    layers = [block.attn2 for block in attention_blocks(unet)]
    return torch.cat([f(states) for layer in layers for f in (layer.to_k, layer.to_v)], -1)


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_maps_are_those_that_diffusers_records(random_components: Components) -> None:
    unet = copy.deepcopy(random_components.unet)
    store = theirs.AttentionStore(attn_res=(4, 4))
    count = 0
    for name, module in unet.named_modules():
        if hasattr(module, "set_processor") and name.endswith(("attn1", "attn2")):
            place = name.split("_")[0]
            module.set_processor(theirs.AttendExciteAttnProcessor(store, place))
            count += 1
    store.num_att_layers = count
    unet(noise().requires_grad_(), 500, hidden())
    expected = store.aggregate_attention(("up", "down", "mid"))

    maps = AttentionUNet(random_components.unet)
    found = maps.maps(noise(), torch.tensor([500]), context(random_components.unet, hidden()))
    assert {(m.place, m.factor) for m in found} == {("down", 2), ("mid", 2), ("up", 2)}
    torch.testing.assert_close(mean_map(found, 2), expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guide", ["attend-and-excite", "boxdiff", "layout-guidance"])
def test_gradient_through_the_unet_in_float64(guide: str, random_components: Components) -> None:
    unet = copy.deepcopy(random_components.unet).double()
    maps = AttentionUNet(unet)
    peer = {
        "attend-and-excite": AttendAndExcite(TARGETS, 2),
        "boxdiff": BoxDiff(TARGETS, 2),
        "layout-guidance": LayoutGuidance(TARGETS),
    }[guide]
    step = GuidanceStep(0, 50, torch.tensor([981]), context(unet, hidden(torch.float64)), maps)
    leaf, found = step.forward(noise(torch.float64))
    gradient = step.gradient(peer.energy(found), leaf)
    assert float(gradient.norm()) > 0
    way, size = gradient / gradient.norm(), 1e-5
    with torch.no_grad():
        ahead, behind = (
            peer.energy(step.forward(leaf.detach() + s * way)[1]) for s in (size, -size)
        )
    assert float(ahead - behind) / (2 * size) == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert (maps.passes.forward, maps.passes.backward) == (3, 1)


def test_an_update_lowers_the_loss(random_components: Components) -> None:
    maps = AttentionUNet(random_components.unet)
    states = context(random_components.unet, hidden())
    step = GuidanceStep(1, 50, torch.tensor([961]), states, maps)
    for peer in (
        AttendAndExcite(TARGETS, 2),
        BoxDiff(TARGETS, 2),
        LayoutGuidance(TARGETS, most_iterations=1),
    ):
        moved, loss = peer(noise(), step)
        assert loss is not None
        assert float(peer.energy(step.forward(moved)[1])) < loss


def test_refinement_stops_at_its_threshold_or_limit(random_components: Components) -> None:
    maps = AttentionUNet(random_components.unet)
    states = context(random_components.unet, hidden())

    def passes(number: int, **settings: Any) -> tuple[int, int]:
        maps.passes.forward = maps.passes.backward = 0
        step = GuidanceStep(number, 50, torch.tensor([961]), states, maps)
        AttendAndExcite(TARGETS, 2, RefinedUpdates(**settings))(noise(), step)
        return maps.passes.forward, maps.passes.backward

    assert passes(10, thresholds={0.2: 1.0}, most_refinements=3) == (4, 4)
    assert passes(10, thresholds={0.2: 0.0}) == (1, 1)
    assert passes(9) == (1, 1)
    assert passes(25) == (0, 0)


def published_step(
    peer: AttendAndExcite | BoxDiff, z: Tensor, step: GuidanceStep, alpha: float, threshold: float
) -> tuple[Tensor, int]:
    """One step of the authors' repositories, in their order of operations: the latent, and how
    often it moved."""
    worst = peer.energy if isinstance(peer, AttendAndExcite) else peer.worst_inner
    leaf, maps = step.forward(z)
    value, moves, rest = float(worst(maps)), 0, None
    if value > 1 - threshold:
        if isinstance(peer, BoxDiff):
            rest = peer.outside(maps).detach()
        while value > max(0, 1 - threshold):
            moves += 1
            leaf, maps = step.forward(z)
            loss = worst(maps)
            value = float(loss)
            z = z - alpha * step.gradient(loss, leaf)
            if moves >= 20:
                break
        leaf, maps = step.forward(z)
    loss = peer.energy(maps)
    if rest is not None and isinstance(peer, BoxDiff):
        loss = peer.inner(maps) + rest
    return z - alpha * step.gradient(loss, leaf), moves


def test_refinement_is_that_of_the_published_code(random_components: Components) -> None:
    maps = AttentionUNet(random_components.unet)
    states = context(random_components.unet, hidden())
    step = GuidanceStep(0, 50, torch.tensor([981]), states, maps)
    for kind in (AttendAndExcite, BoxDiff):
        peer = kind(TARGETS, 2)
        worst = peer.energy if isinstance(peer, AttendAndExcite) else peer.worst_inner
        start = float(worst(step.forward(noise())[1]))
        moved = []
        for drop in (-0.01, 1e-4, 3e-4):
            # reached at once, by some moves, and by many or never
            threshold = 1 - (start - drop)
            updates = RefinedUpdates(thresholds={0.0: threshold})
            expected, moves = published_step(peer, noise(), step, 20.0, threshold)
            maps.passes.backward = 0
            found, _ = kind(TARGETS, 2, updates)(noise(), step)
            assert torch.equal(found, expected), (kind, drop)
            assert maps.passes.backward == moves + 1
            moved.append(moves)
        assert moved[0] == 0 and 2 <= moved[1] < 20, (kind, moved)
        assert moved[1] <= moved[2] <= 20, (kind, moved)


def test_layout_guidance_ends_for_good_once_it_is_there(random_components: Components) -> None:
    maps = AttentionUNet(random_components.unet)
    states = context(random_components.unet, hidden())
    step = GuidanceStep(0, 50, torch.tensor([981]), states, maps)
    peer = LayoutGuidance(TARGETS, threshold=1.0)
    assert peer(noise(), step)[1] is not None and maps.passes.backward == 1
    unmoved, loss = peer(noise(), step)
    assert loss is None and torch.equal(unmoved, noise())
    assert (
        LayoutGuidance(TARGETS)(noise(), GuidanceStep(10, 50, step.timestep, states, maps))[1]
        is None
    )


@pytest.fixture
def runner(random_components: Components) -> Runner:
    return Runner(HCMAPipeline.from_components(random_components), lambda: random_components)


QUICK = [name for name in METHOD_NAMES if name not in ("attend-and-excite", "boxdiff")]
#: twenty refinements at each of three steps take their time
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("attend-and-excite", "boxdiff")]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_every_method_runs_and_an_image_does_not_depend_on_its_batch(
    name: str, runner: Runner
) -> None:
    method = Method.parse(name)
    other = ITEM.model_copy(update={"id": "b", "prompt": "a dog and a cat"})
    alone = runner.generate(method, [ITEM], 3, [7])
    both = runner.generate(method, [other, ITEM], 3, [3, 7])
    difference = alone.images[0].astype(int) - both.images[1].astype(int)
    assert abs(difference).max() <= 1
    assert len(both.losses) == 2
    guided = name in PEERS
    assert (alone.unet_backward > 0) is guided
    assert alone.aligner_passes == (3 if name.startswith("hcma") else 0)
    assert bool(alone.losses[0]) is (guided or name.startswith("hcma"))


def test_a_peer_is_guided_outside_of_the_checkpoints_window(random_components: Components) -> None:
    """The window and the lambdas are HCMA's: `tiny` aligns in a fifth of its steps."""
    pipe = HCMAPipeline.from_components(random_components)
    narrow = {"window": (0.9, 0.95), "lambda_global": 0.25}
    alignment = pipe.info.alignment.model_copy(update=narrow)
    pipe.info = pipe.info.model_copy(update={"alignment": alignment})
    method = Method.parse("layout-guidance")
    found = Runner(pipe, lambda: random_components).generate(method, [ITEM], 3, [7])
    usual = Runner(
        HCMAPipeline.from_components(random_components), lambda: random_components
    ).generate(method, [ITEM], 3, [7])
    assert found.unet_backward == usual.unet_backward > 0
    assert found.losses == usual.losses


@pytest.mark.parametrize("names", [QUICK, pytest.param(METHOD_NAMES, marks=pytest.mark.slow)])
def test_methods_differ_where_they_should(names: list[str], runner: Runner) -> None:
    images = {
        name: runner.generate(Method.parse(name), [ITEM], 3, [7]).images[0].astype(int)
        for name in names
    }
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert abs(images[first] - images[second]).max() > 0, (first, second)


def test_a_layout_without_boxes_is_not_guided(runner: Runner) -> None:
    bare = EvalItem(id="a", prompt="a dog", layout=Layout.empty())
    plain = runner.generate(Method.parse("sd"), [bare], 3, [0])
    guided = runner.generate(Method.parse("boxdiff"), [bare], 3, [0])
    assert (plain.images[0] == guided.images[0]).all() and guided.unet_forward == 0
    assert guided.losses == [[None, None, None]]


@pytest.mark.parametrize(
    "text",
    ["dalle", "hcma:eta", "hcma:eta0=-1", "hcma:steps=3", "gligen:eta0=2", "hcma:guidance_scale=0"],
)
def test_bad_methods_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Method.parse(text)


def test_a_method_may_have_settings() -> None:
    method = Method.parse("hcma:eta0=10,guidance_scale=5")
    settings = method.settings(AlignmentSettings())
    assert (settings.eta0, settings.guidance_scale) == (10, 5)
    assert method.folder == "hcma-eta0=10-guidance_scale=5"


def test_phrases_are_found_in_captions() -> None:
    tokenizer = load_tokenizer(PRESETS["tiny"] / "tokenizer")
    caption = "two zebras and a sports ball on a green field"
    boxes = [(0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 1.0, 1.0), (0.5, 0.0, 1.0, 0.4)]
    layout = Layout(["zebra", "sports ball", "zebra"], boxes)
    found = find_targets(tokenizer, caption, layout, ["zebras", "sports ball", "zebras"])
    assert found == (Target((2,), (boxes[0], boxes[2])), Target((5, 6), (boxes[1],)))
    with pytest.raises(InputError, match="does not mention"):
        find_targets(tokenizer, caption, layout)


def test_every_emoji_scene_mentions_what_it_shows(random_components: Components) -> None:
    tokenizer = load_tokenizer(PRESETS["tiny"] / "tokenizer")
    for item in emoji_items("test", 60):
        targets = find_targets(tokenizer, item.prompt, item.layout, item.mentions)
        assert sum(len(target.boxes) for target in targets) == len(item.layout)


def test_hcma_without_a_rate_is_refused_before_anything_runs(
    random_components: Components,
) -> None:
    settings = AlignmentSettings(eta0=0)
    with pytest.raises(UsageError, match="gligen"):
        Method.parse("hcma").check([ITEM], random_components.tokenizer, settings)
    wrong = ITEM.model_copy(update={"prompt": "a cat"})
    with pytest.raises(InputError, match="image a"):
        Method.parse("boxdiff").check([wrong], random_components.tokenizer, settings)


def test_resolution_of_attention(random_components: Components) -> None:
    assert attention_factors(random_components.unet) == [2]
    assert choose_factor(random_components.unet, None) == 2
    with pytest.raises(UsageError, match="factors 2"):
        choose_factor(random_components.unet, 4)
