"""Floors from counts and rates, what an image calls, and the command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hcma_fast.bench.estimates.counting import Counts, Operation
from hcma_fast.bench.estimates.gpus import GPU, GPUS, PEERS, card_of
from hcma_fast.bench.estimates.roofline import (
    RooflineReport,
    calls,
    parse_batches,
    parse_gpus,
    roofline,
)
from hcma_fast.bench.estimates.times import peer_times, time_call
from hcma_fast.bench.speed.suites.overhead import NoOpEngine
from hcma_fast.cli.app import main
from hcma_fast.cli.bench.limits import roofline_tables
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import UsageError, WeightsError
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.specs import BatchRange, GraphName

CARD = GPU(
    name="C",
    half_flops=1000.0,
    float32_flops=100.0,
    bandwidth=10.0,
    # 10 exponentials per second
    multiprocessors=5,
    clock=0.125,
    source="made up",
)


def test_a_call_takes_as_long_as_the_slower_of_computing_and_moving() -> None:
    operations = (Operation(5000, "float16", 10), Operation(200, "float32", 30))
    time = time_call("align", 1, Counts(operations, weights_bytes=20, io_bytes=10), CARD)
    # each dtype at its own rate: 5 s on tensor cores, 2 s outside of them
    assert (time.compute_s, time.memory_s) == (7.0, 3.0)
    assert (time.floor_s, time.bound) == (7.0, "compute")
    # by itself, the second operator waits for its bytes
    assert time.unfused_s == 5 + 3
    time = time_call("align", 1, Counts(operations, weights_bytes=80, io_bytes=10), CARD)
    assert (time.floor_s, time.bound) == (9.0, "memory")
    assert time.unfused_s == 9.0


def test_the_practical_floor_counts_padding_exponentials_and_norms() -> None:
    product = Operation(5000, "float16", 10)
    attention = Operation(1000, "float16", 5, padding_flops=600, exponentials=40)
    norm, pointwise = Operation(0, "float32", 80, normalised=10), Operation(0, "float16", 500)

    def practical(*operations: Operation) -> float:
        return time_call("align", 1, Counts(operations, 0, 0), CARD).practical_s

    # 5 s of products; its operands take 1
    assert practical(product) == 5
    # 1.6 s of products with the padding, but 4 s of exponentials
    assert practical(attention) == 4
    assert practical(replace(attention, exponentials=0)) == 1.6
    # ten values read and written: in half precision where the products are
    assert practical(product, norm) == 5 + 2 * 10 * 2 / 10
    assert practical(replace(product, dtype="float32"), norm) == 50 + 2 * 10 * 4 / 10
    # fused into its neighbours
    assert practical(product, pointwise) == 5
    found = time_call("align", 1, Counts((product, attention, norm, pointwise), 900, 0), CARD)
    assert found.floor_s == 90 == found.practical_s


def test_published_speeds_as_shares_of_the_peak() -> None:
    """Of the plain UNet: 17% of an H100's peak, 39% of an A100's (1.6 TFLOP an evaluation)."""
    rows = {(row.gpu, row.name): row for row in peer_times(int(1.6e12), int(3.2e12), GPUS)}
    assert len(rows) == len(PEERS)
    assert rows["h100", "stable-fast"].share_of_peak == pytest.approx(0.169, abs=0.001)
    assert rows["a100", "OneDiff"].share_of_peak == pytest.approx(0.39, abs=0.001)
    # twice the operations at the same share
    assert rows["a100", "OneDiff"].ours_at_that_share_s == pytest.approx(2 / 76)
    assert [row.gpu for row in peer_times(1, 1, ["t4", "b200"])] == ["t4"]


def test_drivers_names_of_cards() -> None:
    assert [card_of(name) for name in ("NVIDIA H200", "Tesla T4")] == ["h200", "t4"]
    for name in ("NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 Laptop GPU", "cpu"):
        assert card_of(name) is None


def test_rates_are_dense_and_half_precision_is_the_fastest() -> None:
    for gpu in GPUS.values():
        assert gpu.rate("float16") > gpu.rate("float32") > 0
        assert gpu.rate("bfloat16") == gpu.rate("float16" if gpu.bfloat16 else "float32")
        assert 1e11 < gpu.bandwidth < 1e13
        assert "NVIDIA" in gpu.source
    assert [name for name, gpu in GPUS.items() if not gpu.bfloat16] == ["t4"]
    # operations of a multiprocessor per clock, by its generation's white paper
    per_clock = {"t4": 1024, "a100": 2048, "h100": 4096, "h200": 4096, "b200": 8192}
    per_clock |= {"l40s": 1024, "rtx4090": 512, "rtx5090": 512}
    for name, operations in per_clock.items():
        gpu = GPUS[name]
        arithmetic = gpu.multiprocessors * operations * gpu.clock
        assert gpu.half_flops == pytest.approx(arithmetic, rel=0.02), name
    # FlashAttention-3's paper gives 3.9 T a second for an H100
    assert GPUS["h100"].special_rate == pytest.approx(3.9e12, rel=0.01)
    # memory bus width in bits by data rate, and cores by clock: the white papers' own arithmetic
    assert GPUS["rtx4090"].bandwidth == pytest.approx(384 / 8 * 21e9)
    assert GPUS["l40s"].bandwidth == pytest.approx(384 / 8 * 18e9)
    assert GPUS["rtx5090"].bandwidth == pytest.approx(512 / 8 * 28e9)
    assert GPUS["t4"].bandwidth == pytest.approx(256 / 8 * 10e9)


@given(st.lists(st.integers(1, 512), min_size=1, unique=True))
def test_batches_are_read_back(sizes: list[int]) -> None:
    assert parse_batches(",".join(map(str, sizes))) == sizes
    assert parse_batches(" , ".join(map(str, sizes))) == sizes


@given(st.text(alphabet="0123456789,x -+.e", max_size=12))
def test_any_other_text_is_an_error(text: str) -> None:
    try:
        sizes = parse_batches(text)
    except UsageError:
        return
    assert sizes
    assert all(1 <= size <= 512 for size in sizes)
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("text", ["", "0", "513", "1,,4", "1,1", "4,04", "-1", "1.5", "1;4", "٣"])
def test_bad_batches(text: str) -> None:
    with pytest.raises(UsageError):
        parse_batches(text)


def test_cards() -> None:
    assert parse_gpus("h100, l40s") == ["h100", "l40s"]
    for text in ("v100", "", "H100", "a100,a100"):
        with pytest.raises(UsageError):
            parse_gpus(text)


class Recorder(NoOpEngine):
    """Also notes the batch of each call."""

    def __init__(self, *args: object, seen: Counter[tuple[str, int]]) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.seen = seen

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = len(inputs[self.spec.inputs[0].name])
        self.seen[self.spec.graph, batch] += 1
        return {name: value[:batch] for name, value in super().__call__(inputs).items()}


@pytest.mark.parametrize(
    "settings",
    [
        AlignmentSettings(),
        AlignmentSettings(guidance_scale=1.0, grounding_beta=0.3),
        AlignmentSettings(eta0=0.0, grounding_beta=0.0),
    ],
)
@pytest.mark.parametrize("boxes", [0, 2])
def test_calls_are_those_of_the_pipeline(
    settings: AlignmentSettings, boxes: int, random_components: Components
) -> None:
    batch, steps = 3, 7
    seen: Counter[tuple[str, int]] = Counter()
    specs = random_components.specs()
    most = max(batch * (1 + boxes) + 1, 2 * batch)
    engines = {name: Recorder(specs[name], most, seen=seen) for name in random_components.graphs()}
    info = random_components.info.model_copy(update={"alignment": settings})
    pipe = HCMAPipeline(engines, random_components.tokenizer, info, backend="none", weights_hash="")
    layouts = [
        Layout(phrases=[f"{i} {k}" for k in range(boxes)], boxes=[[0.1, 0.1, 0.6, 0.6]] * boxes)
        for i in range(batch)
    ]
    pipe(
        [f"scene {i}" for i in range(batch)],
        layouts,
        num_inference_steps=steps,
        output_type="pt",
        seed=0,
    )
    expected: Counter[tuple[str, int]] = Counter()
    for call in calls(settings, steps, boxes, batch):
        expected[call.graph, call.batch] += call.times
    assert +expected == seen


def test_fifty_steps_have_51_evaluations_and_50_alignments() -> None:
    by_graph = {c.graph: c for c in calls(AlignmentSettings(), 50, 2, 4)}
    times = {name: call.times for name, call in by_graph.items()}
    assert times["unet_grounded"] == 51
    assert times["unet_plain"] == 0
    assert times["align"] == 50
    assert times["vae_decoder"] == 1
    # guidance doubles the UNet's batch, not the alignment's
    assert (by_graph["unet_grounded"].batch, by_graph["align"].batch) == (8, 4)


@pytest.fixture(scope="module")
def report(random_checkpoint: Path) -> RooflineReport:
    return roofline(str(random_checkpoint), gpus=["h100", "l40s"], batches=[1, 4])


def test_an_image_takes_what_its_calls_take(report: RooflineReport) -> None:
    assert [(row.gpu, row.batch) for row in report.rows] == [
        (gpu, batch) for gpu in ("h100", "l40s") for batch in (1, 4)
    ]
    for row in report.rows:
        by_graph = {call.graph: call for call in row.calls}
        align, unet = by_graph["align"].floor_s, by_graph["unet_grounded"].floor_s
        assert row.evaluation_floor_s == unet
        assert row.step_floor_s == align + unet
        assert row.align_share == pytest.approx(align / (align + unet))
        assert 0 < row.image_floor_s < row.image_practical_s < row.image_unfused_s
        assert row.step_floor_s < row.step_practical_s
        assert row.evaluation_practical_s == by_graph["unet_grounded"].practical_s
        # 51 evaluations, 50 alignments, and a little for texts and decoder
        loop = (51 * unet + 50 * align) / row.batch
        assert loop < row.image_floor_s < 1.2 * loop
    for counts in report.counts.values():
        for graph in counts:
            assert graph.flops == sum(graph.flops_by_dtype.values())
            assert (graph.exponentials > 0) == (graph.graph != "grounding"), graph.graph
            assert graph.normalised > 0
    assert report.peers == ()


def test_a_larger_batch_costs_no_more_per_image(report: RooflineReport) -> None:
    for one, four in zip(report.rows[::2], report.rows[1::2], strict=True):
        assert four.image_floor_s <= one.image_floor_s


def test_tables_say_that_they_are_an_estimate(report: RooflineReport) -> None:
    text = roofline_tables(report)
    tables = text.split("\n\n")
    for index, block in enumerate(tables):
        if block.startswith("|"):
            assert "stimate" in tables[index - 1]
    assert text.count("Estimate") == 3
    assert f"{report.command}; counted on {report.machine.line()}." in text
    assert "51" in text


def test_grounding_alone_stays_in_float32(report: RooflineReport) -> None:
    assert report.precision == "float16"
    for graph in report.counts[1]:
        assert ("float16" in graph.flops_by_dtype) == (graph.graph != "grounding"), graph.graph


def test_an_engine_folder_is_counted_by_its_onnx(random_engine: Path) -> None:
    found = roofline(str(random_engine), gpus=["a100"], batches=[2])
    assert (found.counted, found.precision) == ("ONNX graphs", "float32")
    assert (found.height, found.width) == (16, 16)
    with pytest.raises(UsageError, match="built in float32"):
        roofline(str(random_engine), precision="float16")


def test_engines_of_another_batch_or_backend_are_refused(
    random_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hcma_fast.bench.estimates import roofline as module
    from hcma_fast.errors import InputError
    from hcma_fast.export.manifest import load_manifest

    manifest = load_manifest(random_engine)
    record = manifest.graphs["align"]
    small = replace(record.spec, batch=BatchRange(1, 1, 2))
    graphs = {**manifest.graphs, "align": record.model_copy(update={"spec": small})}
    few = manifest.model_copy(update={"graphs": graphs})
    monkeypatch.setattr(module, "load_manifest", lambda folder: few)
    with pytest.raises(InputError, match="batches of 1:1:2"):
        roofline(str(random_engine), batches=[4])
    other = replace(manifest.target, backend="openvino")
    monkeypatch.setattr(
        module, "load_manifest", lambda folder: manifest.model_copy(update={"target": other})
    )
    with pytest.raises(UsageError, match="onnxruntime"):
        roofline(str(random_engine))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"gpus": []}, UsageError),
        ({"gpus": ["h100,a100", "h100"]}, UsageError),
        ({"batches": [0]}, UsageError),
        ({"precision": "int8"}, UsageError),
        ({"boxes": 31}, UsageError),
        ({"num_inference_steps": 1}, UsageError),
        ({"model": "no-such-model"}, WeightsError),
    ],
)
def test_bad_options(options: dict[str, object], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        roofline(**options)  # type: ignore[arg-type]


def test_the_command(random_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "roofline", "--gpu", "rtx4090", "--model", str(random_checkpoint)]
    assert main([*command, "--batch", "1", "--precision", "bfloat16", "--json"]) == 0
    output = capsys.readouterr()
    found = RooflineReport.model_validate(json.loads(output.out))
    assert (found.kind, found.precision) == ("estimate", "bfloat16")
    assert "counting align" in output.err
    assert main([*command, "--batch", "x"]) == 2
    assert main(["bench", "roofline", "--gpu", "v100"]) == 2
    assert main(["bench", "roofline", "--model", "no-such-model"]) == 3
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_full_size_meets_the_goal() -> None:
    """The alignment takes at most 5% of a denoising step's floor, on every card."""
    before = torch.get_default_dtype()
    found = roofline("sd14", batches=[1])
    peer = next(row for row in found.peers if row.name == "stable-fast")
    assert peer.share_of_peak == pytest.approx(0.17, abs=0.005)
    assert "published, plain SD 1.5 by stable-fast: 104.6" in roofline_tables(found)
    assert torch.get_default_dtype() == before
    assert len(found.rows) == len(GPUS)
    for row in found.rows:
        assert 0 < row.align_share <= found.align_share_goal == 0.05
        by_graph: dict[GraphName, str] = {call.graph: call.bound for call in row.calls}
        assert by_graph["unet_grounded"] == by_graph["vae_decoder"] == "compute"
