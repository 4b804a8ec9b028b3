"""Eager engines in half precision, and with channels last as a GPU has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hcma_fast.errors import UsageError
from hcma_fast.export.backends.eager import eager_engines
from hcma_fast.export.channels_last import ChannelsLastGroupNorm, channels_last
from hcma_fast.export.onnx.trace import random_inputs
from hcma_fast.export.precision import at_precision
from hcma_fast.export.validate import TOLERANCES
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.pipeline import HCMAPipeline
from hcma_fast.specs import BATCH, GRAPH_NAMES

CONVOLUTIONS: tuple[Any, ...] = (torch.ops.aten.convolution, torch.ops.aten.conv2d)


def test_half_precision_agrees_and_shares_weights(random_components: Components) -> None:
    parts, specs = copy.deepcopy(random_components), random_components.specs()
    graphs = parts.graphs()
    wide = eager_engines(graphs, specs, "cpu")
    half = eager_engines(graphs, specs, "cpu", "bfloat16")
    for name in GRAPH_NAMES:
        inputs = random_inputs(specs[name], 2, torch.Generator().manual_seed(0))
        if name == "text_encoder":
            inputs = {key: value % 90 for key, value in inputs.items()}
        expected, found = wide[name](inputs), half[name](inputs)
        for key, value in expected.items():
            if value.is_floating_point():
                error = (found[key].double() - value).norm() / value.norm()
                assert float(error) < TOLERANCES["bfloat16"], (name, key)
    grounded, plain = half["unet_grounded"].module, half["unet_plain"].module
    assert grounded.unet.conv_in.weight.dtype == torch.bfloat16
    assert grounded.unet.conv_in.weight is plain.unet.conv_in.weight
    assert wide["unet_plain"].module.unet.conv_in.weight.dtype == torch.float32


def test_the_pipeline_in_half_precision(random_checkpoint: Any) -> None:
    found = HCMAPipeline.from_pretrained(random_checkpoint, precision="bfloat16")
    expected = HCMAPipeline.from_pretrained(random_checkpoint)
    assert (found.precision, expected.precision) == ("bfloat16", None)
    one, other = (p("a", num_inference_steps=3, seed=0).latents for p in (found, expected))
    assert 0 < float((one - other).norm() / other.norm()) < 0.2
    with pytest.raises(UsageError, match="unknown precision"):
        HCMAPipeline.from_pretrained(random_checkpoint, precision="int8")


def test_group_norm_with_channels_last_equals_torchs() -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
        norm = nn.GroupNorm(4, 16, eps=1e-6)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        ours = ChannelsLastGroupNorm(norm)
        # a mean far from 0, as activations have it, and a group of one value
        x = torch.randn(2, 16, 5, 3) * 3 + 7
        x[:, :4] = 5
        x = x.to(dtype)
        turned = x.contiguous(memory_format=torch.channels_last)
        exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
        for given in (x, turned):
            found = ours(given)
            assert found.dtype == dtype
            assert found.stride() == given.stride()
            varied = slice(4, None)
            assert (found - exact)[:, varied].abs().max() < tolerance * exact.abs().max()
            # of a group of one value only the bias is left
            assert (found - exact)[:, :4].abs().max() < 0.1
        flat = ours(x.flatten(2))
        assert torch.allclose(flat.double(), exact.flatten(2), rtol=1e-2, atol=5e-2)


def test_channels_last_changes_no_result(random_components: Components) -> None:
    specs = random_components.specs()
    for name in ("unet_grounded", "unet_plain", "vae_decoder"):
        module = random_components.graph(name)
        inputs = random_inputs(specs[name], 2, torch.Generator().manual_seed(0)).values()
        turned = channels_last(copy.deepcopy(module))
        with torch.no_grad():
            (expected,), (found,) = module(*inputs), turned(*inputs)
        assert found.shape == expected.shape
        assert float((found - expected).norm() / expected.norm()) < 1e-5, name
    assert not any(isinstance(m, ChannelsLastGroupNorm) for m in module.modules())


class Layouts(TorchDispatchMode):
    """Convolutions by the layout of what they read, and what turns an image around."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[tuple[int, bool]] = []
        """channels of the input; whether it and the weight have them last"""
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        images = [a for a in args if isinstance(a, Tensor) and _is_image(a)]
        if func.overloadpacket in CONVOLUTIONS:
            last = all(a.is_contiguous(memory_format=torch.channels_last) for a in args[:2])
            self.convolutions.append((args[0].shape[1], last))
        elif images and not func.is_view and isinstance(result, Tensor) and _is_image(result):
            lasts = {t.is_contiguous(memory_format=torch.channels_last) for t in (*images, result)}
            if len(lasts) > 1:
                self.copies.append(str(func))
        return result


def _is_image(value: Tensor) -> bool:
    # with one channel or one pixel both layouts are the same
    return value.dim() == 4 and value.shape[1] > 1 and value.shape[2] * value.shape[3] > 1


def watched(parts: Components, name: Any, *, turned: bool) -> Layouts:
    """The graph in half precision on fake tensors: nothing is computed."""
    module = at_precision(name, parts.graph(name), "float16")
    if turned:
        module = channels_last(module)
    watch = Layouts()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = [
            torch.empty(
                [2 if s == BATCH else int(s) for s in t.shape], dtype=getattr(torch, t.dtype)
            )
            for t in parts.specs()[name].inputs
        ]
        with watch:
            module(*inputs)
    return watch


def test_no_convolution_reads_another_layout(random_components: Components) -> None:
    for name in ("unet_grounded", "unet_plain", "vae_decoder"):
        watch = watched(random_components, name, turned=True)
        # the latent's four channels come as the sampler keeps them
        wide = [last for channels, last in watch.convolutions if channels > 4]
        assert len(wide) > 5
        assert all(wide), name
        assert watch.copies == [], name
        before = watched(random_components, name, turned=False)
        assert not all(last for channels, last in before.convolutions if channels > 4)
