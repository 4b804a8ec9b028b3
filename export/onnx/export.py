"""One graph as an ONNX file with named inputs and outputs, by torch.onnx.export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from hcma_fast.export.onnx.trace import dynamic_shapes, example_inputs, traceable
from hcma_fast.export.onnx.translations import TRANSLATIONS, simplified
from hcma_fast.export.weights_file import WeightsFile
from hcma_fast.specs import IOSpec

OPSET = 23
"""ONNX operator set of every exported graph (the first with Attention)."""


def export_onnx(
    spec: IOSpec, module: nn.Module, path: Path, weights: WeightsFile, *, vocabulary: int
) -> None:
    """Write ``module`` to ``path``, and its weights to ``weights`` in the same folder.

    Args:
        spec: names and shapes; ``"batch"`` becomes one symbolic dimension unless it is static.
        module: takes the inputs in the spec's order and returns a tuple of outputs.
        vocabulary: token ids of the example lie below it.
    """
    example, dynamic = example_inputs(spec, vocabulary), dynamic_shapes(spec)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Positional(traceable(spec.graph, module, example)),
            example,
            dynamo=True,
            dynamic_shapes=dynamic and (dynamic,),
            custom_translation_table=TRANSLATIONS,
            input_names=list(spec.input_names),
            output_names=list(spec.output_names),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
        assert program is not None, "torch.onnx.export(dynamo=True) returns a program"
        weights.save(simplified(program.model), path)


class _Positional(nn.Module):
    """A graph with ``*args``, so that every graph declares its dynamic shapes the same way."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        outputs = self.module(*args)
        return tuple(outputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on its own internals are noise to a user; its errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
