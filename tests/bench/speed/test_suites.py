"""The suites of bench run: what they hold, fits, and the command."""

from __future__ import annotations

import itertools
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hcma_fast.bench.estimates.counting import count_module
from hcma_fast.bench.speed.harness.contestants import SD14, Ours, Work, load_plain
from hcma_fast.bench.speed.harness.plan import Plan, extent
from hcma_fast.bench.speed.harness.report import Results, Row, read_results, report_markdown
from hcma_fast.bench.speed.harness.rounds import Case, Group
from hcma_fast.bench.speed.harness.workers import Contestant
from hcma_fast.bench.speed.plain_and_ours import PLAIN
from hcma_fast.bench.speed.suites.ladder import ladder_png
from hcma_fast.bench.speed.suites.peers import load_compiled, load_exported, load_gligen, load_half
from hcma_fast.bench.speed.suites.scaling import fit_scaling, scaling_png
from hcma_fast.bench.speed.suites.stages import align, load_align, load_gradient, load_unet
from hcma_fast.bench.speed.suites.table import ON_GPU, SUITES, check_suites
from hcma_fast.cli.app import main
from hcma_fast.cli.bench.command import bench_app
from hcma_fast.errors import BackendError, HcmaError, UsageError
from hcma_fast.export.manifest import open_folder
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.folder import load_components

from bench_rows import make_row

PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize("model", ["tiny", SD14])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("suite", SUITES)
def test_suites_are_whole(suite: str, quick: bool, model: str) -> None:
    plan = Plan(model, backends=("onnxruntime", "openvino"), quick=quick)
    groups = SUITES[suite][0](plan)
    keys = [(group.name, case.name, str(case.labels)) for group in groups for case in group.cases]
    assert keys and len(set(keys)) == len(keys)
    for group in groups:
        # names are keys, and loads are sent to processes
        assert len({case.name for case in group.cases}) == len(group.cases)
        assert all(pickle.loads(pickle.dumps(case.load)) is not None for case in group.cases)
        if suite in ("latency", "throughput", "peers", "ladder"):
            assert group.cases[0].name == PLAIN
            # at full size no more than two models at once
            assert len(group.cases) <= (2 if model == SD14 else 20)
    if suite == "throughput" and not quick and model == "tiny":
        sizes = {tuple(group.cases[0].labels.values()) for group in groups}
        assert {(b, s, 2) for b in (1, 2, 4, 8, 16, 32) for s in (20, 50)} < sizes


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("tiny", {"batch 1, 50 steps, 2 boxes", "batch 8, 20 steps, 30 boxes"}),
        (SD14, {"batch 4, the first evaluation of 50 steps, 2 boxes: hcma-fast eager"}),
    ],
)
def test_groups_say_how_far_their_runs_go(model: str, names: set[str]) -> None:
    groups = SUITES["throughput"][0](Plan(model, backends=("eager",)))
    assert names <= {group.name for group in groups}
    for group in groups:
        for case in group.cases:
            # one evaluation is not called 50 steps
            assert ("evaluation" in group.name) == ("evaluations" in case.labels)


def test_an_extent_counts_evaluations() -> None:
    assert extent(Work(50, evaluations=3)) == "the first 3 evaluations of 50 steps"


def test_suites_of_a_gpu_are_whole() -> None:
    for groups, _ in SUITES.values():
        for group in groups(Plan(device="cuda", backends=("tensorrt", "eager"))):
            assert len({case.name for case in group.cases}) == len(group.cases)
            pickle.dumps([case.load for case in group.cases])


@pytest.mark.parametrize("boxes", [0, 1, 2, 7, 30])
def test_layouts_have_as_many_boxes_as_asked_for(boxes: int) -> None:
    layout = Work(boxes=boxes).layout
    assert isinstance(layout, Layout) and len(layout) == boxes
    assert len(set(layout.phrases)) == boxes


@pytest.mark.parametrize("boxes", [-1, 31])
def test_too_many_boxes_are_refused(boxes: int) -> None:
    with pytest.raises(UsageError, match="0 to 30"):
        _ = Work(boxes=boxes).layout


def test_gligen_pipeline_is_the_plain_loop_without_alignment(random_checkpoint: Path) -> None:
    work = Work(4, 2, eta0=0.0)
    expected = load_plain(random_checkpoint, work).generate()
    found = load_gligen(str(random_checkpoint), work).generate()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    aligned = load_plain(random_checkpoint, Work(4, 2)).generate()
    assert np.linalg.norm(found - aligned) / np.linalg.norm(aligned) > 1e-3
    # stopped early, where it first tells of its latents
    some = Work(4, 2, eta0=0.0, evaluations=2)
    early = load_gligen(str(random_checkpoint), some).generate()
    assert np.allclose(early, load_plain(random_checkpoint, some).generate(), atol=1e-5)
    assert not np.allclose(early, found, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "peer", ["compiled", "half bfloat16", "onnxruntime", "openvino", "openvino bfloat16"]
)
def test_peers_agree_with_the_plain_loop(random_checkpoint: Path, peer: Any) -> None:
    if peer not in ("compiled", "half bfloat16"):
        pytest.importorskip(peer.split()[0])
    model, work = str(random_checkpoint), Work(3, 2)
    expected = load_plain(model, work).generate()
    if peer == "half bfloat16":
        found = load_half(model, work, "bfloat16").generate()
    elif peer == "compiled":
        found = load_compiled(model, work).generate()
    else:
        found = load_exported(model, work, peer).generate()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < (0.1 if "bfloat16" in peer else 1e-4)


@pytest.mark.slow
def test_gradients_agree_on_the_step(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path))
    found = {
        name: load_gradient(str(random_checkpoint), name, 2, 1, "cpu").generate()
        for name in ("eager", "compile", "onnx")
    }
    # the step itself, not the latent, which would hide an error in it
    assert 0.01 < float(np.abs(found["eager"]).max()) < 100
    for name in ("compile", "onnx"):
        assert np.allclose(found[name], found["eager"], rtol=1e-3, atol=1e-5)


def test_the_unet_alone_agrees_with_torch_and_tells_its_rate(
    random_checkpoint: Path, random_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hcma_fast.bench.speed.harness.contestants._folder",
        lambda model, target: open_folder(random_engine),
    )
    monkeypatch.setattr("hcma_fast.bench.shared.rates.matmul_rate", lambda *_: 4e9)
    runs = {
        name: load_unet(str(random_checkpoint), Ours(name), 2, "cpu")
        for name in ("eager", "onnxruntime")
    }
    # a second between any two looks at the clock
    monkeypatch.setattr("time.perf_counter", partial(next, itertools.count()))
    found = {name: run.generate() for name, run in runs.items()}
    assert np.allclose(found["onnxruntime"], found["eager"], rtol=1e-3, atol=1e-4)
    parts = load_components(random_checkpoint)
    flops = count_module(parts.graph("unet_grounded"), parts.specs()["unet_grounded"], 2).flops
    figures = runs["onnxruntime"].figures()
    assert figures["gflops"] == pytest.approx(2 * flops / 1e9)
    assert figures["share_of_matmul"] == pytest.approx(2 * flops / 4e9)


def test_an_engine_takes_the_same_step_as_autograd(
    random_checkpoint: Path, random_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hcma_fast.bench.speed.harness.contestants._folder",
        lambda model, target: open_folder(random_engine),
    )
    found = load_align(str(random_checkpoint), Ours("onnxruntime"), 2, 1, "cpu").generate()
    expected = load_gradient(str(random_checkpoint), "eager", 2, 1, "cpu").generate()
    # the step itself, not the latent, which would hide an error in it
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert 0.01 < float(np.abs(expected).max()) < 100


def scaling_rows(exponent: float, noise: float) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        make_row(
            f"batch {size}",
            "batch",
            labels={"batch": size},
            seconds=tuple(0.3 * size**exponent * np.exp(noise * rng.standard_normal(9))),
        )
        for size in (1, 2, 4, 8)
    ]


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7])
def test_exponents_are_found_with_intervals_that_hold_them(exponent: float) -> None:
    (noisy,) = fit_scaling(scaling_rows(exponent, 0.05))
    assert noisy.exponent.interval is not None
    low, high = noisy.exponent.interval
    assert low < exponent < high and 0.01 < high - low < 0.3


def test_a_power_law_is_fitted_exactly_and_plotted() -> None:
    (exact,) = fit_scaling(scaling_rows(1.5, 0.0))
    assert exact.exponent.value == pytest.approx(1.5, abs=1e-9)
    assert exact.growth.value == pytest.approx(8**1.5)
    assert scaling_png([exact, exact]).startswith(PNG)


def test_a_straight_line_tells_a_fixed_cost_from_one_that_flattens() -> None:
    (power,) = fit_scaling(scaling_rows(0.8, 0.0))
    assert power.off_line is not None and power.off_line > 0.02
    rows = [
        row.model_copy(update={"seconds": tuple(0.3 + 0.1 * s for s in row.seconds)})
        for row in scaling_rows(1.0, 0.0)
    ]
    (fixed,) = fit_scaling(rows)
    assert fixed.exponent.value < 0.9
    assert fixed.fixed_s is not None and fixed.fixed_s.value == pytest.approx(0.3)
    assert fixed.off_line == pytest.approx(0, abs=1e-9)
    # through two points there always is one
    assert fit_scaling(rows[:2])[0].off_line is None


def test_a_single_size_has_no_fit() -> None:
    assert fit_scaling(scaling_rows(1.0, 0.0)[:1]) == ()


def test_the_gradient_is_measured_on_the_backends_that_are_chosen() -> None:
    def names(*backends: str) -> list[str]:
        return [case.name for case in align(Plan(backends=backends))[0].cases]

    assert names("onnxruntime", "eager") == ["eager", "compile", "onnx"]
    assert names("openvino") == ["eager", "compile", "openvino"]
    assert names("openvino:bfloat16")[-1] == "openvino bfloat16"


@pytest.mark.parametrize("rounds", [True, False])
def test_bfloat16_is_measured_where_the_processor_has_it(
    rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr("hcma_fast.bench.speed.harness.plan.openvino_rounds", lambda device: rounds)
    found = [ours.label for ours in Plan().chosen]
    assert found == [
        *("onnxruntime", "openvino", *(["openvino bfloat16"] if rounds else [])),
        "eager",
    ]


@pytest.mark.parametrize(
    "name", ["nothing", "eager:bfloat16", "onnxruntime:bfloat16", "openvino:x"]
)
def test_backends_and_precisions_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(BackendError):
        check_suites(["latency"], Plan(backends=(name,)))


def test_ladder_plot_leaves_void_rows_out() -> None:
    void = make_row("void", void=True, speedup=None, speedup_interval=None)
    assert ladder_png([make_row(PLAIN), make_row("b"), void]).startswith(PNG)
    # the void row has no bar: the picture is as without it
    assert ladder_png([make_row("b"), void]) == ladder_png([make_row("b")])


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["nonsense"], UsageError),
        (["latency", "latency"], UsageError),
        (["latency", "--backend", "nonsense"], UsageError),
        (["latency", "--device", "nonsense"], UsageError),
        (["latency", "--device", "cudax"], UsageError),
        (["latency", "--model", "/no/such/folder"], HcmaError),
        (["latency", "--json", "--csv"], UsageError),
    ],
)
def test_run_refuses_before_anything_runs(
    arguments: list[str], kind: type[Exception], tmp_path: Path
) -> None:
    result = CliRunner().invoke(bench_app, ["run", *arguments, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, kind)
    assert not (tmp_path / "out").exists() and "load" not in result.stderr


def run_quick(
    checkpoint: Path, out: Path, *suites: str, backends: tuple[str, ...] = ("eager",)
) -> Results:
    """The suites by the command, of the small random model, with all files."""
    arguments = [*suites, "--model", str(checkpoint), "--quick", "--out", str(out), "--json"]
    arguments += [word for backend in backends for word in ("--backend", backend)]
    result = CliRunner().invoke(bench_app, ["run", *arguments])
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = read_results(out / "bench.json")
    assert found == Results.model_validate_json(result.stdout)
    assert [report.suite for report in found.reports] == list(suites)
    for report in found.reports:
        assert report.rows and not report.void and not report.failed and report.quick
        assert (out / f"{report.suite}.md").read_text() == report_markdown(report) + "\n"
        lines = (out / f"{report.suite}.csv").read_text().splitlines()
        assert len(lines) == 1 + len(report.rows)
    return found


def fake_groups(plan: Plan) -> list[Group]:
    """Two cases that agree, and one that cannot run when all backends are asked for."""
    load = partial(Contestant, partial(np.ones, (1, 4, 2, 2), np.float32), "fake", "0" * 64)
    cases = [Case("a", load, {"batch": 1}), Case("b", load, {"batch": 1})]
    if not plan.backends:
        # a phrase without a box: refused, in its process
        cases.append(Case("c", partial(Layout, ["dog"], [])))  # type: ignore[arg-type]
    return [Group("fakes", cases)]


def test_run_measures_and_writes(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "latency", (fake_groups, 5))
    (report,) = run_quick(random_checkpoint, tmp_path, "latency").reports
    assert [row.name for row in report.rows] == ["a", "b"] and report.rounds == 1
    assert report.rows[1].speedup is not None and report.rows[1].images_per_second > 0


def test_an_interrupted_run_goes_on_with_resume(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = []

    def second(plan: Plan) -> list[Group]:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return fake_groups(plan)

    monkeypatch.setitem(SUITES, "latency", (fake_groups, 5))
    monkeypatch.setitem(SUITES, "throughput", (second, 5))
    out = tmp_path / "out"
    arguments = ["bench", "run", "latency", "throughput", "--model", str(random_checkpoint)]
    arguments += ["--quick", "--backend", "eager", "--out", str(out)]
    assert main([*arguments[:-2], "--resume"]) == 2
    assert main(arguments) == 130
    (first,) = read_results(out / "bench.json").reports
    assert main([*arguments, "--resume"]) == 0
    reports = read_results(out / "bench.json").reports
    # the first suite is kept as it was measured
    assert reports[0] == first and [row.name for row in reports[1].rows] == ["a", "b"]


def test_run_ends_with_an_error_if_a_case_cannot_run(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "latency", (fake_groups, 5))
    arguments = ["run", "latency", "--quick", "--model", str(random_checkpoint)]
    result = CliRunner().invoke(bench_app, arguments)
    assert isinstance(result.exception, HcmaError)
    assert "0 rows are void and 1 could not run" in str(result.exception)
    # the others count
    assert "| b |" in result.stdout and "Could not run: fakes: c: " in result.stdout


@pytest.mark.slow
def test_all_suites_run(random_checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HCMA_FAST_CACHE", str(tmp_path / "cache"))
    names = [name for name in SUITES if name not in ("build", *ON_GPU)]
    # the gradient by ONNX Runtime is measured where that is among them
    backends = ("onnxruntime", "eager")
    results = run_quick(random_checkpoint, tmp_path / "out", *names, backends=backends)
    found = {report.suite: report for report in results.reports}
    rows = {suite: [row.name for row in report.rows] for suite, report in found.items()}
    assert {"plain loop, torch.compile", "plain loop, UNet on onnxruntime"} < set(rows["peers"])
    assert "diffusers' GLIGEN pipeline" in rows["peers"]
    assert rows["align"][:3] == ["eager", "compile", "onnx"]
    assert len(rows["ladder"]) == 3
    assert all(row.figures["loop_samples_per_second"] > 0 for row in found["train"].rows)
    assert {fit.axis for fit in found["scaling"].fits} == {"boxes", "steps", "batch"}
    for plot in ("scaling.png", "ladder.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(PNG)


@pytest.mark.slow
def test_builds_are_measured(random_checkpoint: Path) -> None:
    arguments = ["build", "--model", str(random_checkpoint), "--quick", "--json"]
    result = CliRunner().invoke(bench_app, ["run", *arguments, "--backend", "onnxruntime"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    (row,) = Results.model_validate_json(result.stdout).reports[0].rows
    assert row.figures["engine_mib"] > 0.1 and row.figures["build_peak_mib"] > 100
    assert row.warm_up_s is None and len(row.seconds) == 1


@pytest.mark.gpu
def test_all_suites_run_on_a_gpu(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    arguments = ["run", "all", "--device", "cuda", "--quick", "--out", out]
    result = CliRunner().invoke(bench_app, arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = read_results(tmp_path / "out" / "bench.json")
    assert [report.suite for report in found.reports] == list(SUITES)
    for report in found.reports:
        assert report.machine.gpu is not None and report.machine.driver is not None
        for row in report.rows:
            if report.suite != "build":
                assert row.device_peak_mib is not None and row.device_peak_mib > 0
                assert row.clocks.gpu_sm_mhz is not None and row.clocks.gpu_sm_mhz > 0


@pytest.mark.parametrize(("load", "told"), [(0.2, False), (3.4, True)])
def test_a_busy_machine_is_told(
    load: float,
    told: bool,
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SUITES, "latency", (lambda plan: [], 5))
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    result = CliRunner().invoke(bench_app, ["run", "latency", "--model", str(random_checkpoint)])
    assert ("This machine is busy (load 3.4 on 2 cores)" in result.stderr) == told
