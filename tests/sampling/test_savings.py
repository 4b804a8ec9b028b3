"""Savings of the sampler: the exact ones change nothing, the others do what they say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.config import AlignmentSettings
from hcma_fast.engine import Engine
from hcma_fast.errors import UsageError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.generator import BatchGenerator, Request
from hcma_fast.sampling.replay import ReplaySampler
from hcma_fast.sampling.savings import EXACT, Savings, parse_savings
from hcma_fast.sampling.schedule import Schedule
from hcma_fast.specs import GraphName, IOSpec

STEPS = 10
LAYOUT = Layout(phrases=["a", "b"], boxes=[[0.1, 0.1, 0.5, 0.6], [0.4, 0.5, 0.9, 1.0]])


class Noted:
    """An engine that notes the batch size, the latent and the result of each call."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    @property
    def spec(self) -> IOSpec:
        return self.engine.spec

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.engine(inputs)
        self.calls.append(({n: t.clone() for n, t in inputs.items()}, found))
        return found


@pytest.fixture
def noted(random_components: Components) -> tuple[HCMAPipeline, dict[GraphName, Noted]]:
    pipe = HCMAPipeline.from_components(random_components)
    engines: dict[GraphName, Noted] = {n: Noted(e) for n, e in pipe.engines.items()}
    pipe.engines = engines
    return pipe, engines


def latents(pipe: HCMAPipeline, savings: Savings = EXACT, **settings: object) -> Tensor:
    options = {"eta0": 2.0, "align_window": (0.0, 1.0), **settings}
    return pipe(
        "ab", LAYOUT, seed=1, num_inference_steps=STEPS, output_type="latent", savings=savings,
        **options,
    ).latents  # fmt: skip


def test_running_the_idle_alignment_changes_nothing_but_records_losses(
    noted: tuple[HCMAPipeline, dict[GraphName, Noted]],
) -> None:
    pipe, engines = noted
    expected = latents(pipe, align_window=(0.2, 0.5))
    assert len(engines["align"].calls) == 3
    engines["align"].calls.clear()
    found = pipe(
        "ab", LAYOUT, seed=1, num_inference_steps=STEPS, output_type="latent", eta0=2.0,
        align_window=(0.2, 0.5), savings=Savings(skip_idle_alignment=False),
    )  # fmt: skip
    assert len(engines["align"].calls) == STEPS
    assert [entry.step for entry in found.losses] == list(range(STEPS))
    assert torch.equal(found.latents, expected)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}], ids=["guided", "unguided"])
def test_computing_the_contexts_in_every_evaluation_changes_nothing_but_calls(
    noted: tuple[HCMAPipeline, dict[GraphName, Noted]], settings: dict[str, float]
) -> None:
    pipe, engines = noted
    halves = 1 if settings else 2
    expected = latents(pipe, grounding_beta=0.5, **settings)
    assert len(engines["grounding"].calls) == halves
    engines["grounding"].calls.clear()
    found = latents(pipe, Savings(contexts_once=False), grounding_beta=0.5, **settings)
    assert len(engines["grounding"].calls) == halves * (1 + STEPS + 1)
    assert torch.equal(found, expected)
    # and it is those that the UNet gets, in the captured sampler too
    grounding = engines["grounding"].engine
    for replay in (None, ReplaySampler(engines, "cpu")):
        pipe.replay = replay
        engines["unet_grounded"].calls.clear()
        engines["grounding"].engine = Shifted(grounding)
        shifted = latents(pipe, Savings(contexts_once=False), grounding_beta=0.5, **settings)
        seen = [given["text_context"] for given, _ in engines["unet_grounded"].calls]
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(shifted, expected)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}], ids=["guided", "unguided"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_closed_gate_is_the_plain_unet(
    noted: tuple[HCMAPipeline, dict[GraphName, Noted]], beta: float, settings: dict[str, float]
) -> None:
    pipe, engines = noted
    steps = round(beta * STEPS)
    open_calls = steps + (steps > 0)  # the corrector
    expected = latents(pipe, grounding_beta=beta, **settings)
    counts = [len(engines[name].calls) for name in ("unet_grounded", "unet_plain")]
    assert counts == [open_calls, STEPS + 1 - open_calls]
    for replay in (None, ReplaySampler(engines, "cpu")):
        pipe.replay = replay
        for engine in engines.values():
            engine.calls.clear()
        found = latents(pipe, Savings(skip_closed_gate=False), grounding_beta=beta, **settings)
        assert not engines["unet_plain"].calls
        gates = [given["grounding_gate"] for given, _ in engines["unet_grounded"].calls]
        assert all(len(gate) == (1 if settings else 2) for gate in gates)
        assert [float(gate.sum()) / len(gate) for gate in gates] == [1.0] * open_calls + [0.0] * (
            STEPS + 1 - open_calls
        )
        assert float((found - expected).norm() / expected.norm()) < 1e-5


class Shifted:
    """An engine whose answers differ from call to call."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.spec, self.calls = engine, engine.spec, 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        return {name: value + self.calls / 100 for name, value in self.engine(inputs).items()}


def test_guidance_that_ends_recomputes_one_half(
    noted: tuple[HCMAPipeline, dict[GraphName, Noted]],
) -> None:
    pipe, engines = noted
    expected = latents(pipe, Savings(guidance_end=0.6))
    counts = []
    for replay in (None, ReplaySampler(engines, "cpu")):
        pipe.replay = replay
        engines["grounding"].calls.clear()
        found = latents(pipe, Savings(guidance_end=0.6, contexts_once=False))
        counts.append(len(engines["grounding"].calls))
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    # 6 guided steps and the corrector, then 4 without
    assert counts == [2 + 2 * 7 + 4] * 2


def test_a_repeated_gradient_is_the_last_one_at_the_rate_of_the_step(
    noted: tuple[HCMAPipeline, dict[GraphName, Noted]],
) -> None:
    pipe, engines = noted
    latents(pipe, Savings(align_every=3), guidance_scale=1.0)
    assert len(engines["align"].calls) == 4  # steps 0, 3, 6, 9
    schedule = Schedule.of(
        STEPS, AlignmentSettings(eta0=2.0, guidance_scale=1.0), Savings(align_every=3)
    )
    computed = [k for k, what in enumerate(schedule.alignments()) if what == "computed"]
    assert computed == [0, 4, 7, 10], "evaluation 1 is the corrector"
    samples = [call[0]["sample"] for call in engines["unet_grounded"].calls]
    given, found = engines["align"].calls[1]
    gradient = (given["z"] - found["z_aligned"]) / given["eta"]
    # without the alignment of step 4, its latent would be the result of evaluation 4
    z: list[Tensor] = []
    pipe(
        "ab", LAYOUT, seed=1, num_inference_steps=STEPS, output_type="latent",
        savings=Savings(align_every=3), eta0=2.0, align_window=(0.0, 1.0), guidance_scale=1.0,
        callback_on_step_end=lambda p, i, t, kw: z.append(kw["latents"].clone()),
    )  # fmt: skip
    rate = float(schedule.etas[5])
    move = rate * gradient
    torch.testing.assert_close(z[3] - samples[5], move, rtol=1e-2, atol=1e-5)
    assert float(move.abs().max()) > 1e-3


def test_guidance_ends_where_it_is_told(
    noted: tuple[HCMAPipeline, dict[GraphName, Noted]],
) -> None:
    pipe, engines = noted
    latents(pipe, Savings(guidance_end=0.6), grounding_beta=0.3)
    calls = engines["unet_grounded"].calls + engines["unet_plain"].calls
    sizes = [len(given["sample"]) for given, _ in calls]
    # 3 grounded steps and the corrector, then 3 guided and 4 not
    assert sizes == [2] * 4 + [2] * 3 + [1] * 4
    # the half that is left is the caption's own
    first, last = calls[0][0], calls[-1][0]
    assert torch.equal(last["text_context"], first["text_context"][1:])
    assert torch.equal(last["grounding_context"], first["grounding_context"][1:])


def test_guidance_that_ends_at_the_end_is_guidance(
    noted: tuple[HCMAPipeline, dict[GraphName, Noted]],
) -> None:
    pipe, _ = noted
    assert torch.equal(latents(pipe), latents(pipe, Savings(guidance_end=0.99)))
    assert Schedule.of(4, pipe.settings, Savings(guidance_end=0.01)).guided_steps == 1


def test_a_narrow_latent_is_rounded_between_evaluations_only(
    noted: tuple[HCMAPipeline, dict[GraphName, Noted]],
) -> None:
    pipe, engines = noted
    expected = latents(pipe)
    engines["align"].calls.clear()
    found = latents(pipe, Savings(latent_dtype="bfloat16"))
    assert found.dtype == torch.float32
    for given, _ in engines["align"].calls:
        assert given["z"].dtype == torch.float32
        assert torch.equal(given["z"], given["z"].bfloat16().float())
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.05


def test_requests_with_savings_share_batches_and_equal_themselves_alone(
    random_components: Components,
) -> None:
    pipe = HCMAPipeline.from_components(random_components)
    settings = AlignmentSettings(eta0=2.0, grounding_beta=0.6)
    savings = [
        EXACT,
        Savings(align_every=2),
        Savings(guidance_end=0.5),
        Savings(guidance_end=0.5, align_every=3),
        Savings(latent_dtype="bfloat16"),
        Savings(contexts_once=False),
        Savings(skip_closed_gate=False),
    ]
    requests = [
        Request("ab", LAYOUT, i, num_inference_steps=5, settings=settings, savings=some)
        for i, some in enumerate(savings)
    ]
    results = {r.index: r for r in BatchGenerator(pipe, max_batch=4).generate(requests)}
    assert [results[i].batch_size for i in range(7)] == [4, 4, 2, 2, 1, 4, 4]
    for i, some in enumerate(savings):
        alone = pipe(
            "ab", LAYOUT, seed=i, num_inference_steps=5, savings=some, eta0=2.0,
            align_window=(0.0, 1.0), output_type="latent", grounding_beta=0.6,
        )  # fmt: skip
        error = (results[i].latent - alone.latents[0]).norm() / alone.latents.norm()
        assert float(error) < (2e-2 if i == 4 else 1e-5)
        assert [e.step for e in results[i].losses] == [e.step for e in alone.losses]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([], EXACT),
        (["align_every=2"], Savings(align_every=2)),
        (
            ["guidance_end=0.8", "latent_dtype=bfloat16"],
            Savings(guidance_end=0.8, latent_dtype="bfloat16"),
        ),
        (["skip_idle_alignment=false"], Savings(skip_idle_alignment=False)),
        (["contexts_once=false"], Savings(contexts_once=False)),
        (["skip_closed_gate=false"], Savings(skip_closed_gate=False)),
    ],
)
def test_savings_are_read_from_text(texts: list[str], found: Savings) -> None:
    assert parse_savings(texts) == found
    assert found.approximate == any(t.startswith(("align", "guidance", "latent")) for t in texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("align_every", "reads NAME=VALUE"),
        ("eta0=2", "unknown saving"),
        ("align_every=0", "align_every cannot have this value"),
        ("align_every=1.5", "align_every cannot have this value"),
        ("guidance_end=0", "guidance_end cannot have this value"),
        ("guidance_end=nan", "guidance_end cannot have this value"),
        ("skip_closed_gate=", "skip_closed_gate cannot have this value"),
        ("contexts_once=twice", "contexts_once cannot have this value"),
        ("latent_dtype=float16", "latent_dtype cannot have this value"),
    ],
)
def test_bad_savings_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_savings([text])
    with pytest.raises(UsageError, match="each name once"):
        parse_savings(["align_every=2", "align_every=2"])
