"""A pipeline that remembers its requests, and may draw them itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hcma_fast import HCMAPipeline, Request
from hcma_fast.runtime.engine_room import EngineRoom


class WatchedPipeline(HCMAPipeline):
    """``batches`` has the requests of each batch; ``draw`` makes the images in place of the VAE."""

    draw: Callable[[Request], Image.Image] | None = None

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.batches: list[list[Request]] = []

    def engine_room(self, *, cached: bool = False) -> EngineRoom:
        room = super().engine_room(cached=cached)
        sample = room.sample

        def watched(requests: Sequence[Request], *rest: Any, **more: Any) -> Any:
            self.batches.append(list(requests))
            return sample(requests, *rest, **more)

        room.sample = watched  # type: ignore[method-assign, assignment]
        return room

    def decode_all(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.draw is None:
            return super().decode_all(z)
        pixels = [np.asarray(self.draw(request), np.float32) / 255 for request in self.batches[-1]]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.ones(len(z)).bool()
