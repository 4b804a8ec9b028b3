"""Counted operations and bytes: by hand, against torch's own counter, and against known models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hcma_fast.bench.estimates.counting import Counts, count_module, padded_width
from hcma_fast.bench.estimates.onnx_counting import count_onnx
from hcma_fast.errors import EngineError
from hcma_fast.export.manifest import load_manifest
from hcma_fast.export.onnx.trace import trace_gradient
from hcma_fast.export.precision import at_precision
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.models.checkpoint.random_sd14 import RandomSD14
from hcma_fast.models.unet import context_widths
from hcma_fast.specs import BATCH, GRAPH_NAMES, GraphName, IOSpec, TensorSpec

B = 3


def spec_of(*shapes: tuple[int | str, ...], out: tuple[int | str, ...] = (BATCH, 1)) -> IOSpec:
    inputs = tuple(TensorSpec(f"x{i}", (BATCH, *shape)) for i, shape in enumerate(shapes))
    return IOSpec("vae_decoder", inputs, (TensorSpec("y", out),))


def of_inputs(call: Callable[..., Tensor]) -> nn.Module:
    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor]:
            return (call(*inputs),)

    return Module()


class Layer(nn.Module):
    """One layer, as a graph."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


def test_linear_by_hand() -> None:
    counts = count_module(Layer(nn.Linear(20, 30, bias=False)), spec_of((7, 20)), B)
    assert counts.flops == 2 * B * 7 * 20 * 30
    assert counts.weights_bytes == 4 * 20 * 30
    assert counts.io_bytes == 4 * B * 7 * (20 + 30)
    # one operator: nothing passes through the memory that would not anyway
    assert counts.unfused_bytes == counts.compulsory_bytes
    assert [operation.dtype for operation in counts.operations if operation.flops] == ["float32"]


def test_convolution_by_hand() -> None:
    layer = nn.Conv2d(6, 10, kernel_size=(3, 5), stride=2, padding=(1, 2), groups=2)
    counts = count_module(Layer(layer), spec_of((6, 16, 24)), B)
    assert counts.flops == 2 * (B * 10 * 8 * 12) * (6 // 2) * 3 * 5
    assert counts.weights_bytes == 4 * (10 * 3 * 3 * 5 + 10)
    assert counts.unfused_bytes == counts.compulsory_bytes


def test_attention_by_hand_is_one_operator() -> None:
    heads, queries, keys, width = 2, 11, 13, 8
    shapes = ((heads, queries, width), (heads, keys, width), (heads, keys, width))
    counts = count_module(of_inputs(F.scaled_dot_product_attention), spec_of(*shapes), B)
    assert counts.flops == 2 * 2 * B * heads * queries * keys * width
    assert counts.weights_bytes == 0
    # one for each score; a head of 8 is filled up to 16
    assert counts.exponentials == B * heads * queries * keys
    assert counts.padding_flops == counts.flops
    # queries, keys, values and the result: the scores stay inside
    assert counts.unfused_bytes == 4 * B * heads * width * (2 * queries + 2 * keys)


def test_widths_that_attention_kernels_have() -> None:
    # Stable Diffusion's heads, and those of its text encoder
    widths = {40: 64, 80: 96, 160: 192, 64: 64, 256: 256, 300: 300}
    assert {width: padded_width(width) for width in widths} == widths


def test_norms_and_softmax_are_counted_beside() -> None:
    for norm in (nn.GroupNorm(2, 4), nn.LayerNorm(6)):
        counts = count_module(Layer(norm), spec_of((4, 5, 6)), B)
        assert (counts.normalised, counts.flops) == (B * 4 * 5 * 6, 0)
    softmax = count_module(of_inputs(lambda x: x.softmax(-1)), spec_of((7, 9)), B)
    assert (softmax.exponentials, softmax.normalised) == (B * 7 * 9, 0)


def test_pointwise_operators_cost_bytes_and_no_operations() -> None:
    counts = count_module(of_inputs(lambda x: (x + 1).relu()), spec_of((50,)), B)
    assert counts.flops == 0
    assert counts.io_bytes == 4 * B * 50 * 2
    assert counts.unfused_bytes == 4 * B * 50 * 4


def test_views_and_expanded_tensors_cost_nothing() -> None:
    views = of_inputs(lambda x: x.view(-1, 5, 10).transpose(1, 2)[:, 2:])
    assert count_module(views, spec_of((50,)), B).unfused_bytes == 0
    # 4 bytes of a row lie in memory, however often they are read
    repeated = of_inputs(lambda x: x[:, :1].expand(-1, 50) * 2)
    counts = count_module(repeated, spec_of((1,)), B)
    assert counts.unfused_bytes == 4 * B + 4 * B * 50


def test_a_table_is_not_read_whole_and_unused_weights_are_not_read() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.unused = nn.Embedding(10_000, 8), nn.Linear(300, 300)
            self.twice = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.twice(self.twice(self.table(x.long()))),)

    counts = count_module(Table(), spec_of((5,)), B)
    assert counts.weights_bytes == 4 * 8 * 8
    assert counts.unfused_bytes < 4 * 10_000


def test_the_module_is_left_where_it_was(random_components: Components) -> None:
    module = random_components.graph("unet_plain")
    count_module(module, random_components.specs()["unet_plain"], 1)
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def counted(parts: Components, name: GraphName, batch: int) -> Counts:
    return count_module(parts.graph(name), parts.specs()[name], batch)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_operations_and_traffic_grow_with_the_batch_and_weights_do_not(
    name: GraphName, random_components: Components
) -> None:
    one, two, four = (counted(random_components, name, batch) for batch in (1, 2, 4))
    assert two.flops == 2 * one.flops
    assert four.flops == 4 * one.flops
    assert one.flops > 0
    assert one.weights_bytes == two.weights_bytes > 0
    assert four.io_bytes - two.io_bytes == 2 * (two.io_bytes - one.io_bytes)
    assert one.compulsory_bytes <= one.unfused_bytes < two.unfused_bytes


@pytest.mark.parametrize("name", [name for name in GRAPH_NAMES if name != "align"])
def test_the_same_as_torchs_counter(name: GraphName, random_components: Components) -> None:
    module = random_components.graph(name)
    inputs = [
        torch.zeros([2 if s == BATCH else int(s) for s in t.shape], dtype=getattr(torch, t.dtype))
        for t in random_components.specs()[name].inputs
    ]
    # torch's counter knows no attention on a CPU; as products it does
    math = sdpa_kernel(SDPBackend.MATH)
    with math, torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    assert counted(random_components, name, 2).flops == counter.get_total_flops()


@pytest.mark.slow
def test_align_the_same_as_torchs_counter_on_the_traced_gradient(
    random_components: Components,
) -> None:
    spec = random_components.specs()["align"]
    inputs = tuple(
        torch.ones([2 if s == BATCH else int(s) for s in t.shape], dtype=getattr(torch, t.dtype))
        for t in spec.inputs
    )
    traced = trace_gradient(random_components.graph("align"), inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        traced(*inputs)
    assert counted(random_components, "align", 2).flops == counter.get_total_flops()


def test_the_backward_pass_of_align(random_components: Components) -> None:
    """Weights are frozen: a layer's backward is one product, attention's are two for each."""
    aligner, spec = random_components.aligner, random_components.specs()["align"]
    linear = 0

    def add(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal linear
        linear += 2 * output.numel() * layer.in_features

    layers = [m for m in aligner.modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    z, regions = spec.inputs[0].shape[1:], spec.inputs[3].shape[1:]
    with torch.no_grad():
        aligner.features(torch.zeros(2, *z), torch.zeros(2, *regions))  # type: ignore[arg-type]
    for hook in hooks:
        hook.remove()
    config = aligner.config
    tokens = config.grid**2 + 1
    attention = config.depth * 2 * 2 * 2 * tokens**2 * config.width
    pooling = 2 * 2 * int(regions[0]) * config.grid**2 * config.width
    total = counted(random_components, "align", 2).flops
    assert total == 2 * (linear + pooling) + 3 * attention


def test_the_onnx_graphs_have_the_same_operations(
    random_engine: Path, random_components: Components
) -> None:
    manifest = load_manifest(random_engine)
    for name in GRAPH_NAMES:
        for batch in (1, 2):
            found = count_onnx(random_engine / manifest.graphs[name].file, batch)
            expected = counted(random_components, name, batch)
            assert found.flops == expected.flops, name
            assert found.io_bytes == expected.io_bytes, name
            assert found.exponentials == expected.exponentials, name
            if name != "align":
                # align's norms are taken apart for their gradient
                assert found.padding_flops == expected.padding_flops, name
                assert found.normalised == expected.normalised, name
            # the exporter adds constants, such as small weights transposed for the backward pass
            ratio = found.weights_bytes / expected.weights_bytes
            assert 0.98 < ratio < 2, name
            assert found.compulsory_bytes <= found.unfused_bytes


def onnx_file(path: Path, node: onnx.NodeProto, *shapes: tuple[int, ...]) -> Path:
    """A graph of one node; the last shape is that of its output."""
    *inputs, output = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in zip([*node.input, *node.output], shapes, strict=True)
    ]
    onnx.save(helper.make_model(helper.make_graph([node], "one", inputs, [output])), path)
    return path


@pytest.mark.parametrize(
    ("operator", "attributes", "shapes", "flops"),
    [
        ("MatMul", {}, ((2, 3, 4), (4, 5), (2, 3, 5)), 2 * 2 * 3 * 4 * 5),
        ("Gemm", {"transA": 1}, ((4, 3), (4, 5), (3, 5)), 2 * 3 * 4 * 5),
        ("Conv", {}, ((1, 6, 8, 8), (10, 3, 3, 3), (1, 10, 6, 6)), 2 * 10 * 36 * 3 * 9),
        ("Attention", {"q_num_heads": 2, "kv_num_heads": 2},
         ((3, 7, 8), (3, 9, 8), (3, 9, 8), (3, 7, 8)), 2 * 2 * 3 * 7 * 9 * 8),
        ("Attention", {}, ((3, 2, 7, 4), (3, 2, 9, 4), (3, 2, 9, 4), (3, 2, 7, 4)),
         2 * 2 * 3 * 2 * 7 * 9 * 4),
        ("Relu", {}, ((3, 4), (3, 4)), 0),
    ],
)  # fmt: skip
def test_onnx_operators_by_hand(
    operator: str,
    attributes: dict[str, int],
    shapes: tuple[tuple[int, ...], ...],
    flops: int,
    tmp_path: Path,
) -> None:
    names = [f"x{i}" for i in range(len(shapes) - 1)]
    node = helper.make_node(operator, names, ["y"], **attributes)
    counts = count_onnx(onnx_file(tmp_path / "one.onnx", node, *shapes), 1)
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    assert counts.flops == flops
    assert counts.unfused_bytes == counts.io_bytes == 2 * elements
    attention = operator == "Attention"
    assert counts.exponentials == (3 * 2 * 7 * 9 if attention else 0)
    # heads of 4 are filled up to 16
    assert counts.padding_flops == (3 * flops if attention else 0)
    assert counts.operations[0].dtype == ("float16" if flops else "none")


def test_onnx_that_cannot_be_counted_is_an_error(tmp_path: Path) -> None:
    node = helper.make_node("Einsum", ["x0", "x1"], ["y"], equation="ij,jk->ik")
    path = onnx_file(tmp_path / "one.onnx", node, (2, 3), (3, 4), (2, 4))
    with pytest.raises(EngineError, match="Einsum"):
        count_onnx(path, 1)
    node = helper.make_node("MatMul", ["x0", "x1"], ["y"])
    path = onnx_file(tmp_path / "one.onnx", node, (2, 3), (3, 0), (2, 4))
    with pytest.raises(EngineError, match="shape"):
        count_onnx(path, 1)


@pytest.fixture(scope="module")
def full_size() -> Components:
    return RandomSD14().without_weights()


def test_full_size_against_diffusers_own_unet(full_size: Components) -> None:
    """SD 1.4's UNet without GLIGEN, as diffusers has it: 859.52 M parameters."""
    config = {k: v for k, v in full_size.unet.config.items() if k != "attention_type"}
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(config)
        inputs = torch.empty(1, 4, 64, 64), torch.zeros(1), torch.empty(1, 77, 768)
    assert sum(parameter.numel() for parameter in plain.parameters()) == 859_520_964
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(*inputs)
    # what depends on the caption alone is computed by `grounding`, once
    once = 2 * 77 * 768 * sum(context_widths(full_size.unet))
    counts = counted(full_size, "unet_plain", 1)
    assert counts.flops == counter.get_total_flops() - once
    used = 859_520_964 - 768 * sum(context_widths(full_size.unet))
    assert counts.weights_bytes == 4 * used


def test_full_size_against_published_counts(full_size: Components) -> None:
    """onnx-tool's table (github.com/ThanatosShinji/onnx-tool), multiply-adds of SD 1.4.

    It counts pointwise operators and softmax too, so it has a little more; its UNet has both halves
    of the guidance.
    """
    for name, batch, published in (
        ("text_encoder", 1, 6.782e9),
        ("vae_decoder", 1, 1271.959e9),
        ("unet_plain", 2, 888.870e9),
    ):
        flops = counted(full_size, name, batch).flops  # type: ignore[arg-type]
        assert 0.88 < flops / (2 * published) <= 1, name


def test_half_precision_halves_the_weights(full_size: Components) -> None:
    spec = full_size.specs()["align"]
    module = full_size.graph("align")
    whole, half = (
        count_module(at_precision("align", module, precision), spec, 1)
        for precision in ("float32", "float16")  # type: ignore[arg-type]
    )
    assert half.flops == whole.flops
    assert half.weights_bytes == whole.weights_bytes / 2
    assert half.io_bytes == whole.io_bytes
    assert {o.dtype for o in whole.operations if o.flops} == {"float32"}
    # torch computes attention without a fused kernel in float32, as the exported graph does
    assert {o.dtype for o in half.operations if o.flops} == {"float16", "float32"}
