"""SD 1.4 at full size, random weights: every graph builds here, in bounded memory, and runs.

Prints times and sizes (``-s``); docs/build.md has those of one run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.bench.shared.memory import peak_rss_mib
from hcma_fast.engine import Engine
from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.export.manifest import load_manifest
from hcma_fast.models.checkpoint.random_sd14 import RandomSD14
from hcma_fast.specs import GRAPH_NAMES, GraphName

_MOST_BYTES = 12e9
_OPTIONS = {
    "onnxruntime": [],
    "openvino": [],
    "tensorrt-rtx": ["--precision", "float16", "--gpu-arch", "sm89", "--batch", "1:1:4"],
}


class _OneAtATime(Mapping[GraphName, Engine]):
    """Torch's graphs at full size: one module in memory, made when it is asked for."""

    def __init__(self) -> None:
        self.source = RandomSD14()
        self.specs = self.source.specs()
        self.held: tuple[GraphName, EagerEngine] | None = None

    def __getitem__(self, name: GraphName) -> Engine:
        if name == "align":
            # takes turns with the UNet, and is small
            return EagerEngine(self.source.graph(name), self.specs[name])
        if self.held is None or self.held[0] != name:
            self.held = None
            self.held = (name, EagerEngine(self.source.graph(name), self.specs[name]))
        return self.held[1]

    def __iter__(self) -> Iterator[GraphName]:
        return iter(GRAPH_NAMES)

    def __len__(self) -> int:
        return len(GRAPH_NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("backend", _OPTIONS)
def test_builds_all_graphs_at_full_size_and_samples_as_torch(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend.replace("-", "_"))
    folder = tmp_path / backend
    command = [sys.executable, "-m", "hcma_fast.cli.app", "build", "--model", "sd14"]
    command += ["--random-weights", "--backend", backend, *_OPTIONS[backend], "--out", str(folder)]
    started = time.monotonic()
    peak = peak_rss_mib(command) * 2**20
    print(f"{backend}: {time.monotonic() - started:.0f} s, {peak / 1e9:.1f} GB of memory")
    assert peak <= _MOST_BYTES
    graphs = load_manifest(folder).graphs
    assert set(graphs) == set(GRAPH_NAMES)
    for name, graph in graphs.items():
        print(f"{backend} {name}: error {graph.parity:.1e}, {graph.seconds:.0f} s")
        assert graph.parity <= graph.tolerance
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{backend}: {size / 1e9:.1f} GB on disk")
    assert size <= _MOST_BYTES
    if backend == "tensorrt-rtx":
        return  # runs on a GPU only

    def sample(pipe: HCMAPipeline) -> torch.Tensor:
        layout = Layout(["dog", "pizza"], [(0.05, 0.3, 0.45, 0.9), (0.5, 0.5, 0.95, 0.9)])
        out = pipe("a dog", layout, num_inference_steps=2, seed=0, output_type="latent")
        assert len(out.losses) == 2
        return out.latents

    found = sample(HCMAPipeline.from_engines(folder))
    engines = _OneAtATime()
    source = engines.source
    eager = HCMAPipeline(
        engines, source.tokenizer, source.info, backend="eager", weights_hash=source.weights_hash
    )
    reference = sample(eager)
    error = float((found - reference).norm() / reference.norm())
    print(f"{backend}: relative error of two steps {error:.1e}")
    assert error < 1e-3
