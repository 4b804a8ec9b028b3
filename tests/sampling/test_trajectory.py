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
from hcma_fast.sampling.loop import CONTEXTS, Conditioning, Schedule, sample
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import EXACT, Savings
from hcma_fast.sampling.trajectory import Buffers, FusedTrajectory, Trajectory, evaluation_kinds
from hcma_fast.specs import GRAPH_NAMES, STEP_NAMES, GraphName, IOSpec

from captures import Counted, conditioned, make_engines, noise, plan, relative

EVERY = (*GRAPH_NAMES, *STEP_NAMES)
FRUGAL = Savings(align_every=3, guidance_end=0.7, latent_dtype="bfloat16")
WASTEFUL = Savings(skip_idle_alignment=False, contexts_once=False, skip_closed_gate=False)
CASES = pytest.mark.parametrize(
    ("savings", "fused", "captured"),
    [
        (EXACT, False, True),
        (FRUGAL, False, True),
        (WASTEFUL, False, True),
        (EXACT, True, True),
        (EXACT, False, False),
        (FRUGAL, False, False),
    ],
    ids=["exact", "frugal", "wasteful", "fused", "called", "called-frugal"],
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
            evaluation_kinds([one, other])
    assert len(evaluation_kinds([plan(steps=4), plan(steps=8)])) == 9


def test_the_grounded_unet_runs_while_one_image_needs_it() -> None:
    def gated(*schedules: Schedule) -> list[bool]:
        return [kind.gated for kind in evaluation_kinds(schedules)]

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


def make_buffers(
    engines: Mapping[GraphName, Engine],
    given: Conditioning,
    device: str,
    savings: Savings,
    fused: bool,
    captured: bool,
) -> Buffers:
    where = torch.device(device)
    if fused:
        return FusedTrajectory(engines, given, (4, 8, 8), where)
    narrow = getattr(torch, savings.latent_dtype)
    return Trajectory(engines, given, (4, 8, 8), 2, where, narrow, captured=captured)


def tensors_of(batch: Buffers) -> dict[str, Tensor]:
    """All buffers, and what the engines are given of them."""
    groups = [vars(batch)]
    if isinstance(batch, Trajectory):
        groups += [vars(batch.conditioning), batch.align_inputs, *batch.unet_inputs.values()]
        groups += [{f"update.{name}": value for name, value in vars(batch.update).items()}]
        groups += [{f"grounding.{name}": v for name, v in batch.halves[0][0].items()}]
    if isinstance(batch, FusedTrajectory):
        groups += [batch.inputs]
    every = {name: value for group in groups for name, value in group.items()}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


@CASES
def test_evaluations_allocate_nothing_and_keep_their_addresses(
    engines: dict[GraphName, Engine],
    random_components: Components,
    savings: Savings,
    fused: bool,
    captured: bool,
) -> None:
    given = conditioned(random_components, engines, [0, 1])
    steady: dict[GraphName, Engine] = {name: InPlace(engine) for name, engine in engines.items()}
    batch = make_buffers(steady, given, "cpu", savings, fused, captured)
    schedule = plan(steps=50, beta=0.5, window=(0.0, 0.8), savings=savings)
    kinds = [batch.launches(kind) for kind in evaluation_kinds([schedule])]
    with torch.no_grad():
        for kind in set(kinds):
            batch.evaluate(kind)
        batch.load(noise([0, 1]), given, [schedule])
        before = {name: tensor.data_ptr() for name, tensor in tensors_of(batch).items()}
        with Watch() as watch:
            for kind in kinds:
                batch.evaluate(kind)
    assert len(kinds) == 51 and int(batch.step) == 51
    assert not watch.allocating, watch.allocating
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(batch).items()} == before
    assert len(before) > 15
    # what is not contiguous would be copied by an engine that takes addresses
    assert all(tensor.is_contiguous() for tensor in tensors_of(batch).values())
    assert watch.ops["hcma_fast.denoise_update_.default"] == (51 if captured and not fused else 0)
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
    random_components: Components, savings: Savings, fused: bool, captured: bool
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
    batch = make_buffers(engines, given, "meta", savings, fused, captured)
    schedule = plan(steps=10, beta=0.5, window=(0.0, 0.8), savings=savings)
    batch.load(torch.empty(2, 4, 8, 8), given, [schedule])
    kinds = [batch.launches(kind) for kind in evaluation_kinds([schedule])]
    assert len(set(kinds)) == (2 if fused else {EXACT: 4, FRUGAL: 7, WASTEFUL: 2}[savings])
    with torch.no_grad(), OnDevice():
        for kind in kinds:
            batch.evaluate(kind)
    with pytest.raises(AssertionError, match="touches cpu"), OnDevice():
        batch.z.copy_(torch.zeros(2, 4, 8, 8))
    with pytest.raises(RuntimeError, match="meta"):
        float(batch.z.sum())


def test_captured_kinds_of_a_shape_are_bounded(
    engines: dict[GraphName, Engine], random_components: Components
) -> None:
    separate = {name: engines[name] for name in GRAPH_NAMES}
    captures = Counted()
    sampler = ReplaySampler(separate, "cpu", capture=captures)
    given = conditioned(random_components, engines, [0])
    frugal = Savings(align_every=2, guidance_end=0.5)
    runs = [
        plan(beta=0.5, window=(0.0, 0.7)),
        plan(beta=0.3, savings=frugal),
        plan(beta=0.7, window=(0.3, 1.0), savings=frugal),
    ]
    for schedule in runs:
        found, _ = sampler(noise([0]), given, schedule)
        assert relative(found, sample(separate, noise([0]), given, schedule)[0]) < 1e-5
        (batch,) = sampler._shapes.values()
        needed = set(evaluation_kinds([schedule]))
        assert len(batch.captured) <= max(8, len(needed))
        assert {(kind,) for kind in needed} <= set(batch.captured)
    every = {kind for schedule in runs for kind in evaluation_kinds([schedule])}
    assert captures.captures >= len(every) > 8, "more kinds than are kept"


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
