"""Compiling ahead of time: whole files or none, static batches, what a GPU needs and a capture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hcma_fast.errors import BackendError, UsageError
from hcma_fast.export.backends.aoti.build import TUNINGS, compile_aoti, export_program
from hcma_fast.export.channels_last import channels_last
from hcma_fast.export.key import key_parts
from hcma_fast.export.onnx.trace import example_inputs
from hcma_fast.export.precision import Precision, at_precision
from hcma_fast.export.target import Target
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.sampling.exported import graph_of
from hcma_fast.specs import GRAPH_NAMES, STEP_NAMES, BatchRange, GraphName, IOSpec, TensorSpec

TENSORS = (TensorSpec("z", ("batch", 3)),), (TensorSpec("image", ("batch", 3)),)


class Double(nn.Module):
    def forward(self, z: Tensor) -> tuple[Tensor]:
        return (2 * z,)


def test_a_static_batch_is_compiled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = IOSpec("vae_decoder", *TENSORS, BatchRange(4, 4, 4))
    shapes = []

    def write(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        (node,) = (n for n in program.graph.nodes if n.op == "placeholder")
        shapes.append(tuple(node.meta["val"].shape))
        Path(package_path).write_bytes(b"engine")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", write)
    compile_aoti(spec, Double(), tmp_path / "x.pt2")
    compile_aoti(IOSpec("vae_decoder", *TENSORS), Double(), tmp_path / "x.pt2")
    assert shapes[0] == (4, 3)
    assert isinstance(shapes[1][0], torch.SymInt)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]


def test_tuning_is_named_and_asks_inductor_for_options_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def write(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        given.append(inductor_configs)
        Path(package_path).write_bytes(b"engine")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", write)
    spec = IOSpec("vae_decoder", *TENSORS)
    for tuning in TUNINGS:
        compile_aoti(spec, Double(), tmp_path / "x.pt2", tuning=tuning)
    plain, tuned = given
    assert not plain.keys() & {"max_autotune", "coordinate_descent_tuning"}
    assert {"max_autotune", "coordinate_descent_tuning", "epilogue_fusion"} <= tuned.keys()
    known = torch._inductor.config.get_config_copy()
    assert set(TUNINGS["autotune"]) <= set(known)
    targets = [Target("torch-compile", device="cuda", tuning=tuning) for tuning in TUNINGS]
    assert len({key_parts("w", target)["options"] for target in targets}) == 2
    for wrong in ({"tuning": "most"}, {"tuning": "autotune"}):
        with pytest.raises(UsageError, match="tuning"):
            Target("torch-compile", **wrong)  # type: ignore[arg-type]


def test_a_gpus_graph_turns_no_image_around(random_components: Components) -> None:
    """Traced as for a GPU, with one batch: every convolution reads and writes channels last."""
    for name in ("unet_grounded", "unet_plain"):
        spec = random_components.specs(batch=BatchRange(1, 1, 1))[name]
        half = at_precision(name, random_components.graph(name), "float16")
        for turned in (True, False):
            module = channels_last(copy.deepcopy(half)) if turned else half
            with torch.no_grad():
                graph = export_program(spec, module, example_inputs(spec)).graph
            seen = []
            for node in graph.nodes:
                value = node.meta.get("val")
                if node.target == torch.ops.aten.convolution.default:
                    image = node.args[0].meta["val"]
                    # the latent's four channels come as the sampler keeps them
                    if image.shape[1] > 4:
                        seen.append(image.is_contiguous(memory_format=torch.channels_last))
                elif turned and node.target == torch.ops.aten.clone.default and value.dim() == 4:
                    # upsampling is a gather, and a clone that Inductor fuses with it
                    assert value.is_contiguous(memory_format=torch.channels_last), node
            assert len(seen) > 5
            assert all(seen) == turned, name


def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        Path(package_path).write_bytes(b"half an eng")
        raise RuntimeError("the compiler fell over")

    (tmp_path / "x.pt2").write_bytes(b"old")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(RuntimeError, match="fell over"):
        compile_aoti(IOSpec("vae_decoder", *TENSORS), Double(), tmp_path / "x.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]
    assert (tmp_path / "x.pt2").read_bytes() == b"old"


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(BackendError, match=r"apt install g\+\+"),
    ):
        compile_aoti(IOSpec("vae_decoder", *TENSORS), Double(), tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gpu", "missing", "toolkit", "remedy"),
    [
        (False, "", "/usr/local/cuda", "Build on the GPU's machine"),
        (True, "triton", "/usr/local/cuda", r"hcma-fast\[gpu\]"),
        (True, "", None, "CUDA_HOME is not set"),
        # a runtime alone has no headers
        (True, "", "/nowhere", "CUDA_HOME is /nowhere"),
    ],
)
def test_what_a_gpu_needs_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    missing: str,
    toolkit: str | None,
    remedy: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        "hcma_fast.export.backends.aoti.build.find_spec", lambda name: name != missing or None
    )
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", toolkit)
    spec = IOSpec("vae_decoder", *TENSORS)
    with pytest.raises(BackendError, match=remedy):
        compile_aoti(spec, Double(), tmp_path / "x.pt2", device="cuda")
    assert list(tmp_path.iterdir()) == []


#: the parts of all graphs, `align` and `unet_grounded` inside of the step's
QUICK = ("text_encoder", "grounding", "vae_decoder", "step_grounded")


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "float16") for name in QUICK),
        *(
            pytest.param(name, precision, marks=pytest.mark.slow)
            for name in (*GRAPH_NAMES, *STEP_NAMES)
            for precision in ("float32", "float16")
            if precision == "float32" or name not in QUICK
        ),
    ],
)
def test_a_graph_is_of_one_device_alone(
    random_components: Components, name: GraphName, precision: Precision
) -> None:
    """On a GPU a constant of the CPU would be a copy from the host, which a capture forbids.

    And its kernels must know the true range of the batch: see ``export_program``.
    """
    spec = random_components.specs()[name]
    module = at_precision(name, graph_of(random_components, name), precision)
    example = tuple(value.to("meta") for value in example_inputs(spec))
    with torch.no_grad():
        program = export_program(spec, copy.deepcopy(module).to("meta"), example)
    devices = {
        value.device.type
        for node in program.graph.nodes
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val"))
        if isinstance(value, Tensor)
    }
    kept = {value.device.type for value in program.constants.values() if isinstance(value, Tensor)}
    assert devices | kept == {"meta"}
    (batch,) = program.range_constraints.values()
    assert (batch.lower, batch.upper) == (spec.batch.min, spec.batch.max)
