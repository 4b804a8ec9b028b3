"""On what the suites run: model, device, backends, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

from hcma_fast.bench.speed.harness.contestants import SD14, Ours, Work
from hcma_fast.bench.speed.harness.rounds import Case, Group
from hcma_fast.errors import BackendError
from hcma_fast.sampling.capture import CAPTURABLE


@dataclass(frozen=True)
class Plan:
    """On what a suite runs."""

    model: str = "tiny"
    """preset, folder, or sd14: full size, random weights, one denoising evaluation"""
    device: str = "cpu"
    backends: tuple[str, ...] = ()
    """of our pipeline, as ``backend`` or ``backend:precision``; none for those that are here"""
    rounds: int | None = None
    """None for the suite's own number"""
    quick: bool = False
    """few rounds of small sizes: whether it works, not how fast"""

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def chosen(self) -> tuple[Ours, ...]:
        """Backends of our pipeline.

        Raises:
            BackendError: an unknown one, or not in the precision that is asked for.
        """
        return tuple(map(Ours.named, self.backends)) or installed_backends(self.device)

    @property
    def deployed(self) -> tuple[Ours, ...]:
        """All backends, and what of the leading ones is not among them."""
        return tuple(dict.fromkeys((*self.chosen, *self.leading)))

    @property
    def leading(self) -> tuple[Ours, ...]:
        """What stands for our pipeline where many sizes run: the first backend, on a GPU also with
        CUDA graphs."""
        first = self.chosen[0]
        captured = replace(first, cuda_graphs="step")
        return (first, captured) if self.on_gpu and first.backend in CAPTURABLE else (first,)

    def work(self, batch: int = 1, **changes: int) -> Work:
        """50 steps, few when it must be quick, one evaluation at full size."""
        steps = changes.pop("steps", 4 if self.quick else 50)
        whole = self.model != SD14
        return Work(steps, batch, evaluations=None if whole else 1, **changes)


def extent(work: Work) -> str:
    """How far a run goes, for the name of a group."""
    if work.evaluations is None:
        return f"{work.steps} steps"
    some = "evaluation" if work.evaluations == 1 else f"{work.evaluations} evaluations"
    return f"the first {some} of {work.steps} steps"


def installed_backends(device: str) -> tuple[Ours, ...]:
    """Compiled backends that can be measured on this device, eager last."""
    if not device.startswith("cuda"):
        found = [Ours(name) for name in ("onnxruntime", "openvino") if find_spec(name)]
        if openvino_rounds(device):
            found.append(Ours("openvino", precision="bfloat16"))
        return (*found, Ours("eager"))
    from hcma_fast.export.backends.onnxruntime.session import CUDA

    found = [
        Ours(backend, precision=precision)
        for backend in _native_backends(device)
        # what is deployed comes first, and stands for us in the large suites
        for precision in ("float16", "float32")
    ]
    if find_spec("onnxruntime"):
        import onnxruntime

        if CUDA[0] in onnxruntime.get_available_providers():
            found.append(Ours("onnxruntime"))
    return (*found, Ours("eager"))


def _native_backends(device: str) -> list[str]:
    """Backends that compile for a GPU, of those that are installed and can for this one."""
    from hcma_fast.export.backends.aoti.build import check_compiler
    from hcma_fast.export.backends.trt.build import ARCHITECTURES
    from hcma_fast.export.target import TRT_LIBRARIES

    card = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    found: list[str] = [
        library
        for library in TRT_LIBRARIES
        if find_spec(library.replace("-", "_")) and card in (ARCHITECTURES[library] or (card,))
    ]
    with suppress(BackendError):
        check_compiler(device)
        found.append("torch-compile")
    return found


def openvino_rounds(device: str) -> bool:
    """Whether OpenVINO is here and computes in bfloat16 on this processor."""
    if device.startswith("cuda") or not find_spec("openvino"):
        return False
    from hcma_fast.export.backends.openvino.model import computes

    return computes("bfloat16")


def side_by_side(
    plan: Plan, name: str, cases: Sequence[Case], left_out: Mapping[str, str] | None = None
) -> list[Group]:
    """The first case with all the others; at full size with one at a time, for their memory."""
    out = left_out or {}
    if plan.model != SD14 or len(cases) == 1:
        return [Group(name, cases, out)]
    groups = [Group(f"{name}: {other.name}", [cases[0], other]) for other in cases[1:]]
    return [replace(groups[0], left_out=out), *groups[1:]]
