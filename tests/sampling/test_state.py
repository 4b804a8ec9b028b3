"""Both kinds of evaluation that are captured: what a CUDA graph demands of them, and the fused one.

Without a GPU the captured function is called instead of replayed. What a graph demands of it is
tested on the devices that are there: on "cpu" that it allocates nothing and keeps its addresses, on
"meta" that it never reads a value, nor touches the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcma_fast.engine import Engine
from hcma_fast.errors import BackendError, InputError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.sampling.capture import check_capturable
from hcma_fast.sampling.conditioning import CONTEXTS, Conditioning
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import EXACT, Savings
from hcma_fast.sampling.schedule import Networks, Schedule, evaluation_networks, networks_of
from hcma_fast.sampling.state import SeparateGraphs, State, StepGraphs
from hcma_fast.specs import GRAPH_NAMES, STEP_NAMES, GraphName, IOSpec

from captures import Counted, conditioned, make_engines, noise, plan

EVERY = (*GRAPH_NAMES, *STEP_NAMES)
FRUGAL = Savings(align_every=3, guidance_end=0.7, latent_dtype="bfloat16")
WASTEFUL = Savings(skip_idle_alignment=False, contexts_once=False, skip_closed_gate=False)
CASES = pytest.mark.parametrize(
    ("savings", "fused"),
    [(EXACT, False), (FRUGAL, False), (WASTEFUL, False), (EXACT, True)],
    ids=["exact", "frugal", "wasteful", "fused"],
)


@pytest.fixture(scope="module")
def engines(random_components: Components) -> dict[GraphName, Engine]:
    return make_engines(random_components, names=EVERY)


def test_a_batch_that_needs_two_widths_at_once_is_refused() -> None:
    ends = Savings(guidance_end=0.5)
    for one, other in (
        (plan(), plan(savings=ends)),
        (plan(4, savings=ends), plan(8, savings=ends)),
    ):
        with pytest.raises(InputError, match="same step"):
            evaluation_networks([one, other])
    assert len(evaluation_networks([plan(steps=4), plan(steps=8)])) == 9


def test_images_at_evaluations_of_their_own_run_what_one_of_them_needs() -> None:
    half = plan(4, beta=0.5, window=(0.0, 0.5))
    assert networks_of([(half, 0)]) == Networks(True, True, True)
    assert networks_of([(half, 1), (half, 4)]) == Networks(False, True, True)
    assert networks_of([(half, 3), (half, 4)]) == Networks(False, False, True)
    assert networks_of([(plan(guidance=1.0), 2)]) == Networks(True, True, False)


def test_the_grounded_unet_runs_while_one_image_needs_it() -> None:
    def gated(*schedules: Schedule) -> list[bool]:
        return [kind.grounded for kind in evaluation_networks(schedules)]

    # the second evaluation corrects the first step
    assert gated(plan(4, beta=0.5)) == [True] * 3 + [False] * 2
    assert gated(plan(4, beta=0.5), plan(4, beta=0.0)) == [True] * 3 + [False] * 2
    assert gated(plan(8, beta=0.25), plan(4)) == [True] * 5 + [False] * 4
    assert gated(plan(2, beta=0.0)) == [False] * 3
    assert gated(plan(2, beta=0.0, savings=Savings(skip_closed_gate=False))) == [True] * 3


class InPlace:
    """An engine as TensorRT's: it writes into outputs that it allocated once, for one shape."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[str, Tensor] = {}

    @property
    def spec(self) -> IOSpec:
        return self.engine.spec

    def fork(self, captured: bool = True) -> InPlace:
        return InPlace(self.engine)

    def check_capturable(self) -> None:
        """It always is."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with Unwatched():
            found = self.engine(inputs)
            for name, value in found.items():
                self.outputs.setdefault(name, value.clone()).copy_(value)
        return self.outputs


class Watch(TorchDispatchMode):
    """Notes every op, and those that made a tensor in memory that none of their inputs has."""

    watching = True

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.allocating: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if Watch.watching:
            self.ops[str(func)] += 1
            known = {
                leaf.untyped_storage().data_ptr()
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, Tensor)
            }
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                    self.allocating[str(func)] += 1
        return result


class Unwatched:
    def __enter__(self) -> None:
        Watch.watching = False

    def __exit__(self, *error: object) -> None:
        Watch.watching = True


def make_state(
    engines: Mapping[GraphName, Engine],
    given: Conditioning,
    device: str,
    schedule: Schedule,
    fused: bool,
) -> State:
    make = StepGraphs if fused else SeparateGraphs
    like = torch.zeros(2, 4, 8, 8, device=device)
    return make(engines, given, like, [schedule], captured=True)


def tensors_of(state: State) -> dict[str, Tensor]:
    """All tensors of a state, and what the engines are given of them."""
    groups = [vars(state)]
    if isinstance(state, SeparateGraphs):
        groups += [state.conditioning.tensors(), state.align_inputs, *state.unet_inputs.values()]
        groups += [{f"grounding.{name}": v for name, v in state.halves[0][0].items()}]
    if isinstance(state, StepGraphs):
        groups += [state.inputs]
    every = {name: value for group in groups for name, value in group.items()}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


@CASES
def test_evaluations_allocate_nothing_and_keep_their_addresses(
    engines: dict[GraphName, Engine],
    random_components: Components,
    savings: Savings,
    fused: bool,
) -> None:
    given = conditioned(random_components, engines, [0, 1])
    steady: dict[GraphName, Engine] = {name: InPlace(engine) for name, engine in engines.items()}
    schedule = plan(steps=50, beta=0.5, window=(0.0, 0.8), savings=savings)
    batch = make_state(steady, given, "cpu", schedule, fused)
    kinds = [batch.launches(kind) for kind in evaluation_networks([schedule])]
    with torch.no_grad():
        for kind in set(kinds):
            batch.advance(kind)
        batch.load(noise([0, 1]), given, [schedule])
        before = {name: tensor.data_ptr() for name, tensor in tensors_of(batch).items()}
        with Watch() as watch:
            for kind in kinds:
                batch.advance(kind)
    assert len(kinds) == 51 and batch.step.tolist() == [51, 51]
    assert not watch.allocating, watch.allocating
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(batch).items()} == before
    assert len(before) > 15
    # what is not contiguous would be copied by an engine that takes addresses
    public = {n: t for n, t in tensors_of(batch).items() if not n.startswith("_")}
    assert all(tensor.is_contiguous() for tensor in public.values())
    assert watch.ops["hcma_fast.denoise_update_.default"] == (0 if fused else 51)
    # the watch itself works
    with Watch() as watch:
        torch.cat([batch.z, batch.z])
    assert watch.allocating


class OnDevice(TorchDispatchMode):
    """Refuses an op that touches another device than "meta", where no value can be read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                raise AssertionError(f"{func} touches {leaf.device}")
        return result


@CASES
def test_evaluations_never_read_a_value_nor_touch_the_host(
    random_components: Components, savings: Savings, fused: bool
) -> None:
    """All of torch eager's graphs, the gradient included: what a GPU would be asked to capture."""
    specs = random_components.specs()
    engines = make_engines(random_components, "meta", EVERY)
    shapes = {
        "text_context": specs["unet_grounded"].inputs[2].shape,
        "grounding_context": specs["unet_grounded"].inputs[3].shape,
        "caption_embedding": specs["align"].inputs[1].shape,
        "label_embeddings": specs["align"].inputs[2].shape,
        "regions": specs["align"].inputs[3].shape,
        "region_mask": specs["align"].inputs[4].shape,
        "boxes": specs["grounding"].inputs[0].shape,
        "encoder_hidden_states": specs["grounding"].inputs[3].shape,
    }
    halved = (*CONTEXTS, "encoder_hidden_states")
    given = Conditioning(
        **{
            name: torch.empty(4 if name in halved else 2, *shape[1:], device="meta")
            for name, shape in shapes.items()
        }
    )
    schedule = plan(steps=10, beta=0.5, window=(0.0, 0.8), savings=savings)
    batch = make_state(engines, given, "meta", schedule, fused)
    batch.load(torch.empty(2, 4, 8, 8), given, [schedule])
    kinds = [batch.launches(kind) for kind in evaluation_networks([schedule])]
    assert len(set(kinds)) == (2 if fused else {EXACT: 4, FRUGAL: 5, WASTEFUL: 2}[savings])
    with torch.no_grad(), OnDevice():
        for kind in kinds:
            batch.advance(kind)
    with pytest.raises(AssertionError, match="touches cpu"), OnDevice():
        batch.z.copy_(torch.zeros(2, 4, 8, 8))
    with pytest.raises(RuntimeError, match="meta"):
        float(batch.z.sum())


class Uncapturable(InPlace):
    """An engine as TensorRT-RTX's that was built without what a capture needs."""

    def fork(self, captured: bool = True) -> Uncapturable:
        return Uncapturable(self.engine)

    def check_capturable(self) -> None:
        raise BackendError("not built for it", remedy="Build it again.")


@pytest.mark.parametrize("name", ["align", "unet_plain", "step_grounded", "vae_decoder"])
def test_an_engine_that_refuses_is_asked_before_and_after_its_first_run(
    engines: dict[GraphName, Engine], random_components: Components, name: GraphName
) -> None:
    mixed: dict[GraphName, Engine] = {**engines, name: Uncapturable(engines[name])}
    if name not in STEP_NAMES:
        mixed = {n: e for n, e in mixed.items() if n not in STEP_NAMES}
    if name == "vae_decoder":
        # it runs outside of the sampler
        check_capturable("step", "cuda", "tensorrt-rtx", None, mixed)
    else:
        with pytest.raises(BackendError, match="not built for it"):
            check_capturable("step", "cuda", "tensorrt-rtx", None, mixed)
    sampler = ReplaySampler(mixed, "cpu", capture=Counted())
    given = conditioned(random_components, engines, [0])
    if name == "vae_decoder":
        sampler(noise([0]), given, plan(beta=0.5))
    else:
        with pytest.raises(BackendError, match="not built for it"):
            sampler(noise([0]), given, plan(beta=0.5))
