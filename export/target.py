"""What engines are built for: backend, precision, batch sizes, image size, GPU architectures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from hcma_fast.errors import BackendError, UsageError
from hcma_fast.export.backends.aoti import build as aoti
from hcma_fast.export.backends.onnxruntime.session import onnxruntime_version
from hcma_fast.export.backends.openvino.model import openvino_version
from hcma_fast.export.backends.trt.build import TRTLibrary, TRTOptions, trt_version
from hcma_fast.export.precision import PRECISIONS, Precision
from hcma_fast.specs import ANY_BATCH, GRAPH_NAMES, STEP_NAMES, BatchRange, GraphName

Backend = Literal[
    "onnxruntime", "onnxruntime-tensorrt", "openvino", "torch-compile", "tensorrt", "tensorrt-rtx"
]
_TRT_BATCH = BatchRange(1, 1, 8)
COMPILED_BACKENDS: tuple[Backend, ...] = get_args(Backend)
TRT_LIBRARIES: tuple[TRTLibrary, ...] = get_args(TRTLibrary)

#: What each can compute in. OpenVINO rounds float32 graphs to bfloat16 where the CPU has it.
#: ONNX Runtime's TensorRT provider rounds float32 products to TF32, and has no switch for it.
PRECISIONS_OF: dict[str, tuple[Precision, ...]] = {
    "onnxruntime": ("float32", "float16"),
    "onnxruntime-tensorrt": ("float16",),
    "openvino": ("float32", "bfloat16"),
    "torch-compile": PRECISIONS,
    "tensorrt": ("float32", "float16"),
    "tensorrt-rtx": ("float32", "float16"),
}


def default_precision(backend: str) -> Precision:
    """float32 where the backend computes in it, else the first that it has."""
    possible = PRECISIONS_OF.get(backend, ("float32",))
    return "float32" if "float32" in possible else possible[0]


@dataclass(frozen=True)
class Target:
    """What to build for. Checked when it is made, before anything is loaded.

    Args:
        batch: images at once; with guidance the UNet's batch is twice that. None for any number,
            with TensorRT for up to eight.
        height, width: of the images, in pixels; None for the size that the model was trained at.
        architectures: NVIDIA GPUs, such as "sm89"; for tensorrt-rtx.
        workspace_mib, strip_weights: see ``trt_engine.TRTOptions``.
        fuse: "step" adds graphs that do a whole evaluation, see ``sampling.exported``.
        device: what torch-compile compiles for: this machine's CPU, or its GPU ("cuda"). Other
            backends' engines are not for the one or the other, or for a GPU only.
        tuning: "autotune" has torch-compile search for faster kernels on the GPU, see
            ``aoti.build.TUNINGS``.

    Raises:
        BackendError: a precision or architecture that the backend lacks.
        UsageError: an unknown backend, or an option that it does not have.
    """

    backend: str
    precision: Precision = "float32"
    batch: BatchRange | None = None
    height: int | None = None
    width: int | None = None
    architectures: tuple[str, ...] = ()
    workspace_mib: int | None = None
    strip_weights: bool = False
    fuse: Literal["none", "step"] = "none"
    device: Literal["cpu", "cuda"] = "cpu"
    tuning: aoti.Tuning = "default"

    def __post_init__(self) -> None:
        if self.backend not in COMPILED_BACKENDS:
            raise UsageError(
                "engines cannot be built for this backend",
                value=self.backend,
                remedy=f"Backends: {', '.join(COMPILED_BACKENDS)}.",
            )
        if self.fuse not in ("none", "step"):
            raise UsageError(
                "unknown fusion of graphs", value=self.fuse, remedy="Use none or step."
            )
        if self.device not in ("cpu", "cuda"):
            raise UsageError(
                "engines are not built for this device",
                value=self.device,
                remedy="Use cpu or cuda, which is torch's current GPU.",
            )
        if self.device != "cpu" and self.backend != "torch-compile":
            raise UsageError(
                "the device is an option of torch-compile alone",
                value=self.backend,
                remedy="Leave it out: other engines run wherever their backend does.",
            )
        if self.tuning not in aoti.TUNINGS:
            raise UsageError(
                "unknown tuning",
                value=self.tuning,
                remedy=f"Use one of {', '.join(aoti.TUNINGS)}.",
            )
        if self.tuning != "default" and self.device != "cuda":
            raise UsageError(
                "tuning is an option of torch-compile on a GPU",
                value=f"{self.backend} on {self.device}",
                remedy="Leave it out, or add the device cuda.",
            )
        possible = PRECISIONS_OF[self.backend]
        if self.precision not in possible:
            raise BackendError(
                f"the backend {self.backend} does not compute in this precision",
                value=self.precision,
                remedy=f"Use one of {', '.join(possible)}.",
            )
        if self.fuse == "step" and (self.backend, self.precision) == ("openvino", "bfloat16"):
            raise UsageError(
                "OpenVINO rounds timesteps and the update of the latent to bfloat16 in step graphs",
                value="fuse=step",
                remedy="Use float32, or fuse=none.",
            )
        if self.backend in TRT_LIBRARIES:
            self.trt_options()
        elif self.architectures or self.strip_weights or self.workspace_mib is not None:
            raise UsageError(
                "architectures, workspace and stripped weights are options of TensorRT",
                value=self.backend,
                remedy=f"Leave them out, or use one of {', '.join(TRT_LIBRARIES)}.",
            )

    def trt_options(self) -> TRTOptions:
        """For TensorRT's builder."""
        return TRTOptions(
            library="tensorrt" if self.backend == "tensorrt" else "tensorrt-rtx",
            architectures=self.architectures,
            workspace_mib=self.workspace_mib,
            strip_weights=self.strip_weights,
        )

    @property
    def graph_names(self) -> tuple[GraphName, ...]:
        """What is built of a model that has all parts, see :meth:`graphs_of`."""
        return GRAPH_NAMES + (STEP_NAMES if self.fuse == "step" else ())

    def graphs_of(self, specs: Container[GraphName]) -> tuple[GraphName, ...]:
        """What is built of a model with these graphs.

        Raises:
            UsageError: steps cannot be fused, for want of an aligner or of GLIGEN's layers.
        """
        if self.fuse == "step" and not all(name in specs for name in STEP_NAMES):
            raise UsageError(
                "step graphs hold an alignment and gated attention, and this model lacks one",
                value="fuse=step",
                remedy="Use fuse=none, or a model with GLIGEN's layers and an aligner.",
            )
        return tuple(name for name in self.graph_names if name in specs)

    @property
    def batch_range(self) -> BatchRange:
        """Images at once."""
        tuned = self.backend in (*TRT_LIBRARIES, "onnxruntime-tensorrt")
        return self.batch or (_TRT_BATCH if tuned else ANY_BATCH)

    @property
    def native(self) -> bool:
        """The engines are code for one kind of machine, rather than ONNX graphs."""
        return self.backend not in ("onnxruntime", "onnxruntime-tensorrt", "openvino")


def device_for(backend: str, device: str) -> Literal["cpu", "cuda"]:
    """``Target.device`` of engines that will run on ``device``."""
    return "cuda" if backend == "torch-compile" and device.startswith("cuda") else "cpu"


def backend_version(backend: str) -> str:
    """Version of what runs the engines, which are not used with another one.

    Raises:
        BackendError: it is not installed.
    """
    if backend in ("onnxruntime", "onnxruntime-tensorrt"):
        return onnxruntime_version()
    if backend == "openvino":
        return openvino_version()
    if backend in TRT_LIBRARIES:
        return trt_version(backend)
    return str(torch.__version__)


def machine(target: Target) -> str:
    """What native code is tied to: the GPUs or, for CPU code, the CPU's instructions."""
    if not target.native:
        return "any"
    if target.backend == "torch-compile":
        return aoti.target(target.device)
    if target.architectures:
        return " ".join(target.architectures)
    return f"{torch.cuda.get_device_name()} driver {_driver()}" if _has_gpu() else "no GPU"


def check_buildable(target: Target) -> None:
    """Refuse what cannot end well, before the first graph is exported.

    Raises:
        BackendError: no GPU, no compiler, or no ONNX Runtime to check the graphs with.
    """
    if target.backend == "torch-compile":
        aoti.check_compiler(target.device)
    if target.backend not in TRT_LIBRARIES:
        return
    onnxruntime_version()
    if not target.architectures and not _has_gpu():
        raise BackendError(
            f"{target.backend} builds for the GPU that is here, and torch finds none",
            remedy="Name GPUs for tensorrt-rtx: --gpu-arch sm89."
            if target.backend == "tensorrt-rtx"
            else "Build on the GPU's machine, or use tensorrt-rtx with --gpu-arch.",
        )


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _driver() -> str:
    with contextlib.suppress(OSError), open("/proc/driver/nvidia/version") as file:
        return file.readline().strip()
    return os.environ.get("NVIDIA_DRIVER_VERSION", "unknown")
