"""The signatures agree with what the graphs really take and give."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import get_args

import pytest
import torch
from torch import Tensor

from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH
from hcma_fast.errors import InputError, UsageError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import (
    BATCH,
    GRAPH_NAMES,
    STEP_NAMES,
    BatchRange,
    GraphName,
    IOSpec,
    TensorSpec,
    graph_specs,
)


def sd14_specs(time_conditioned: bool = False) -> dict[GraphName, IOSpec]:
    return graph_specs(
        latent_height=64,
        latent_width=96,
        text_width=768,
        context_width=1280,
        patch_size=4,
        vae_factor=8,
        time_conditioned=time_conditioned,
    )


def shapes(tensors: tuple[TensorSpec, ...]) -> dict[str, tuple[int | str, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


def test_graphs_in_order() -> None:
    specs = sd14_specs()
    assert tuple(specs) == (*GRAPH_NAMES, *STEP_NAMES) == get_args(GraphName)
    assert all(spec.graph == name for name, spec in specs.items())


def test_shapes_of_the_papers_model() -> None:
    specs = sd14_specs()
    align = specs["align"]
    assert shapes(align.inputs) == {
        "z": (BATCH, 4, 64, 96),
        "caption_embedding": (BATCH, 768),
        "label_embeddings": (BATCH, MAX_OBJECTS, 768),
        "regions": (BATCH, MAX_OBJECTS, 16 * 24),
        "region_mask": (BATCH, MAX_OBJECTS),
        "eta": (BATCH,),
        "lambdas": (BATCH, 2),
    }
    assert align.output_names == ("z_aligned", "loss_global", "loss_local")
    assert shapes(specs["vae_decoder"].outputs) == {"image": (BATCH, 3, 512, 768)}
    assert shapes(specs["text_encoder"].inputs) == {"input_ids": (BATCH, TOKEN_LENGTH)}
    assert specs["text_encoder"].inputs[0].dtype == "int64"
    assert shapes(specs["grounding"].outputs) == {
        "text_context": (BATCH, TOKEN_LENGTH, 1280),
        "grounding_context": (BATCH, MAX_OBJECTS, 1280),
        "regions": (BATCH, MAX_OBJECTS, 16 * 24),
    }
    plain, grounded = specs["unet_plain"], specs["unet_grounded"]
    assert grounded.input_names == (*plain.input_names, "grounding_context", "grounding_gate")
    assert grounded.outputs == plain.outputs


def test_time_conditioning_adds_the_timestep_to_align() -> None:
    without, with_time = sd14_specs()["align"], sd14_specs(time_conditioned=True)["align"]
    assert with_time.input_names == (*without.input_names, "timestep")
    assert with_time.inputs[-1].dtype == "int64"


def test_specs_are_immutable() -> None:
    spec = sd14_specs()["align"]
    with pytest.raises(FrozenInstanceError):
        spec.graph = "grounding"  # type: ignore[misc]


def example(spec: TensorSpec, batch: int) -> Tensor:
    shape = [batch if side == BATCH else int(side) for side in spec.shape]
    if spec.dtype == "int64":
        return torch.ones(shape, dtype=torch.int64)
    return torch.rand(shape)


@pytest.mark.parametrize("name", GRAPH_NAMES)
@torch.no_grad()
def test_graphs_keep_their_signature(random_components: Components, name: GraphName) -> None:
    spec, graph = random_components.specs()[name], random_components.graphs()[name]
    for batch in (1, 3):
        outputs = graph(*(example(tensor, batch) for tensor in spec.inputs))
        assert len(outputs) == len(spec.outputs)
        for output, tensor in zip(outputs, spec.outputs, strict=True):
            expected = [batch if side == BATCH else side for side in tensor.shape]
            assert list(output.shape) == expected, tensor.name
            assert str(output.dtype) == f"torch.{tensor.dtype}"


@pytest.mark.parametrize("side", [17, -16, 18])
def test_wrong_image_sides(random_components: Components, side: int) -> None:
    with pytest.raises(InputError) as caught:
        random_components.specs(side, side)
    assert caught.value.value == side and "16" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "expected"), [("4", (4, 4, 4)), ("1:8:16", (1, 8, 16)), ("1024", (1024,) * 3)]
)
def test_batch_ranges(text: str, expected: tuple[int, int, int]) -> None:
    found = BatchRange.parse(text)
    assert (found.min, found.opt, found.max) == expected
    assert str(found) == text and found.static == (len(set(expected)) == 1)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "a", "1:2", "1:2:3:4", "8:4:16", "1:16:8", "0:1:2", "1025", "1.5", " 1"]
)
def test_bad_batch_ranges(text: str) -> None:
    with pytest.raises(UsageError, match="1:8:16"):
        BatchRange.parse(text)


def test_ranges_of_guided_graphs_are_twice_as_large() -> None:
    assert str(BatchRange(1, 4, 8).times(2)) == "2:8:16"
