"""Signatures of the graphs: names, shapes and dtypes, shared by export, engines and tests."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from hcma_fast.config import MAX_OBJECTS, TOKEN_LENGTH
from hcma_fast.errors import UsageError

GraphName = Literal[
    "text_encoder",
    "grounding",
    "align",
    "unet_grounded",
    "unet_plain",
    "vae_decoder",
    "step_grounded",
    "step_plain",
]
GRAPH_NAMES: tuple[GraphName, ...] = (
    "text_encoder",
    "grounding",
    "align",
    "unet_grounded",
    "unet_plain",
    "vae_decoder",
)
STEP_NAMES: tuple[GraphName, ...] = ("step_grounded", "step_plain")
"""An evaluation in one graph; only built when asked for"""
HISTORY = 3
"""Earlier predictions that a solver may use"""


class Column:
    """Columns of a plan, which holds all numbers of one image's trajectory, a row per evaluation.

    Those from ``PREDICTION_Z`` on are the solver's (``sampling.solvers``):

        prediction = PREDICTION_Z z + PREDICTION_EPS eps
        z' = NEXT_Z z + NEXT_STORED stored + NEXT_MOVE move + NEXT_NOISE noise
             + NEXT_SCALE (NEXT_0 prediction + sum of NEXT_j history_j)
        stored' = STORED_Z z + STORED_STORED stored + STORED_MOVE move + STORED_NOISE noise
                  + STORED_0 prediction + sum of STORED_j history_j

    z is the aligned latent, and move what the alignment added to it. (Plain numbers: members of an
    enum take longer to look up than an operator to run.)
    """

    TIMESTEP = 0
    ETA = 1
    """rate of a computed alignment, 0 without"""
    REPEAT = 2
    """rate at which an earlier gradient is followed"""
    GATE = 3
    """1 with gated attention, 0 without"""
    GUIDANCE = 4
    ACTIVE = 5
    """0 where nothing may change: behind the last evaluation"""
    PREDICTION_Z = 6
    PREDICTION_EPS = 7
    NEXT_Z = 8
    NEXT_STORED = 9
    NEXT_MOVE = 10
    NEXT_NOISE = 11
    NEXT_SCALE = 12
    NEXT_0 = 13
    NEXT_1 = 14
    NEXT_2 = 15
    NEXT_3 = 16
    STORED_Z = 17
    STORED_STORED = 18
    STORED_MOVE = 19
    STORED_NOISE = 20
    STORED_0 = 21
    STORED_1 = 22
    STORED_2 = 23
    STORED_3 = 24
    PUSHES = 25
    """1 where the prediction joins the history"""


PLAN_ROWS, PLAN_COLUMNS = 1001, 26
"""Of a plan: the longest trajectory has 1,000 evaluations, so that the last row never changes an
image"""
BATCH = "batch"
MAX_BATCH = 1024
_TEXTS = 32
"""texts that the text encoder takes at once, at least"""
DType = Literal["float32", "float16", "bfloat16", "int64"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, shape (``"batch"`` is symbolic, other entries fixed) and dtype."""

    name: str
    shape: tuple[int | str, ...]
    dtype: DType = "float32"


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that a compiled graph takes, and the one that it is tuned for.

    Raises:
        UsageError: not 1 <= min <= opt <= max <= 1024.
    """

    min: int = 1
    opt: int = 1
    max: int = MAX_BATCH // 2

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max <= MAX_BATCH:
            raise UsageError(
                f"a batch range needs 1 <= min <= opt <= max <= {MAX_BATCH}",
                value=str(self),
                remedy="Write one size, such as 4, or min:opt:max, such as 1:8:16.",
            )

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """From "4" (that size only) or "1:8:16" (min:opt:max).

        Raises:
            UsageError: not of this form, or out of order.
        """
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
            raise UsageError(
                "this is not a batch size or range",
                value=text,
                remedy="Write one size, such as 4, or min:opt:max, such as 1:8:16.",
            )
        sizes = [int(part) for part in parts]
        return cls(*sizes) if len(sizes) == 3 else cls(*sizes * 3)

    @property
    def static(self) -> bool:
        """One size only."""
        return self.min == self.max

    def times(self, factor: int) -> BatchRange:
        """Every size multiplied."""
        return BatchRange(self.min * factor, self.opt * factor, self.max * factor)

    def __str__(self) -> str:
        return str(self.min) if self.static else f"{self.min}:{self.opt}:{self.max}"


ANY_BATCH = BatchRange()


@dataclass(frozen=True)
class IOSpec:
    """Inputs and outputs of one graph, in call order, and the batch sizes that it takes."""

    graph: GraphName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: BatchRange = ANY_BATCH

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.outputs)


def _tensor(name: str, *shape: int | str, dtype: DType = "float32") -> TensorSpec:
    return TensorSpec(name, (BATCH, *shape), dtype)


def graph_specs(
    *,
    latent_height: int,
    latent_width: int,
    text_width: int,
    context_width: int,
    patch_size: int,
    vae_factor: int,
    latent_channels: int = 4,
    time_conditioned: bool = False,
    aligned: bool = True,
    grounded: bool = True,
    batch: BatchRange = ANY_BATCH,
) -> dict[GraphName, IOSpec]:
    """The signatures for one latent size (design.md section 4), the step graphs last.

    Args:
        context_width: sum of ``models.unet.context_widths``.
        aligned, grounded: whether the model has an aligner, and GLIGEN's layers. Without one, the
            graphs that need it are missing, and so are the tensors that would come from it.
        batch: images at once. The UNet's batch is that of both halves of the guidance, or of one.
    """
    halves = batch.times(2) if batch.static else replace(batch.times(2), min=batch.min)
    # as many texts as there are prompts and phrases, in several calls if need be
    texts = BatchRange(1, min(batch.opt * 2, _TEXTS), max(batch.max, _TEXTS))
    latent = (latent_channels, latent_height, latent_width)
    cells = (latent_height // patch_size) * (latent_width // patch_size)
    caption = _tensor("caption_embedding", text_width)
    labels = _tensor("label_embeddings", MAX_OBJECTS, text_width)
    mask = _tensor("region_mask", MAX_OBJECTS)
    regions = _tensor("regions", MAX_OBJECTS, cells)
    hidden = _tensor("encoder_hidden_states", TOKEN_LENGTH, text_width)
    text_context = _tensor("text_context", TOKEN_LENGTH, context_width)
    objects = _tensor("grounding_context", MAX_OBJECTS, context_width)
    timestep = _tensor("timestep", dtype="int64")
    unet = (_tensor("sample", *latent), timestep, text_context)
    noise = (_tensor("noise_pred", *latent),)
    align = (
        _tensor("z", *latent),
        caption,
        labels,
        regions,
        mask,
        _tensor("eta"),
        _tensor("lambdas", 2),
        *((timestep,) if time_conditioned else ()),
    )
    specs: tuple[IOSpec, ...] = (
        IOSpec(
            "text_encoder",
            (_tensor("input_ids", TOKEN_LENGTH, dtype="int64"),),
            (
                _tensor("last_hidden_state", TOKEN_LENGTH, text_width),
                _tensor("pooler_output", text_width),
            ),
            texts,
        ),
        IOSpec(
            "grounding",
            (
                *((_tensor("boxes", MAX_OBJECTS, 4), mask) if aligned or grounded else ()),
                *((labels,) if grounded else ()),
                hidden,
            ),
            (text_context, *((objects,) if grounded else ()), *((regions,) if aligned else ())),
            batch,
        ),
        IOSpec(
            "align",
            align,
            (
                _tensor("z_aligned", *latent),
                _tensor("loss_global"),
                _tensor("loss_local", MAX_OBJECTS),
            ),
            batch,
        ),
        IOSpec("unet_grounded", (*unet, objects, _tensor("grounding_gate")), noise, halves),
        IOSpec("unet_plain", unet, noise, halves),
        IOSpec(
            "vae_decoder",
            (_tensor("z", *latent),),
            (_tensor("image", 3, latent_height * vae_factor, latent_width * vae_factor),),
            batch,
        ),
    )
    history = _tensor("history", HISTORY, *latent)
    index = _tensor("index", dtype="int64")
    halves_of = [replace(t, shape=(BATCH, 2, *t.shape[1:])) for t in (text_context, objects)]
    fixed = (
        _tensor("z", *latent),
        _tensor("stored", *latent),
        history,
        index,
        _tensor("plan", PLAN_ROWS, PLAN_COLUMNS),
        _tensor("lambdas", 2),
        caption,
        labels,
        regions,
        mask,
    )
    moved = (*fixed[:4], _tensor("loss_global"), _tensor("loss_local", MAX_OBJECTS))
    specs += (
        IOSpec("step_grounded", (*fixed, *halves_of), _renamed(moved), batch),
        IOSpec("step_plain", (*fixed, halves_of[0]), _renamed(moved), batch),
    )
    missing = {
        *(() if aligned else ("align", "step_grounded", "step_plain")),
        *(() if grounded else ("unet_grounded", "step_grounded")),
    }
    return {spec.graph: spec for spec in specs if spec.graph not in missing}


def _renamed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Outputs that are the next call's inputs: ONNX wants names of their own."""
    state = ("z", "stored", "history", "index")
    return tuple(replace(t, name=f"next_{t.name}") if t.name in state else t for t in tensors)
