"""What tests of evaluations share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hcma_fast.bench.quality.generate import RunSettings
from hcma_fast.config import AlignmentSettings


@pytest.fixture(scope="session")
def run_of() -> Callable[[int], RunSettings]:
    """The settings of a run over so many layouts, 64 x 64 pixels."""

    def make(count: int) -> RunSettings:
        return RunSettings(
            preset="random",
            backend="eager",
            device="cpu",
            weights_hash="0",
            engine_hash=None,
            settings=AlignmentSettings(),
            num_inference_steps=2,
            seed=0,
            width=64,
            height=64,
            count=count,
            items_hash="0",
            data="",
            attention_factor=None,
        )

    return make
