"""Compiling ahead of time: whole files or none, static batches, and a missing compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hcma_fast.errors import BackendError
from hcma_fast.export.aoti import compile_aoti
from hcma_fast.specs import BatchRange, IOSpec, TensorSpec

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
