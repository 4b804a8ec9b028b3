"""Which code computes the alignment gradient, whatever backend runs the UNet."""

from __future__ import annotations

from importlib.util import find_spec

from hcma_fast.config import GRAD_BACKENDS
from hcma_fast.engine import Engine
from hcma_fast.errors import BackendError, UsageError
from hcma_fast.export.backends.eager import EagerEngine
from hcma_fast.kernels.cosine_loss import cosine_loss_op
from hcma_fast.kernels.region_pool import region_pool
from hcma_fast.models.aligner import AlignStep
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.specs import IOSpec


def check_grad_backend(name: str, device: str) -> None:
    """Refuse what cannot run, before anything is loaded.

    Raises:
        UsageError: an unknown name.
        BackendError: Triton without a GPU.
    """
    if name not in GRAD_BACKENDS:
        raise UsageError(
            "unknown backend of the gradient",
            value=name,
            remedy=f"Gradient backends: {', '.join(GRAD_BACKENDS)}.",
        )
    if name == "triton" and not (device.startswith("cuda") and find_spec("triton")):
        raise BackendError(
            "the fused kernels need Triton and an NVIDIA GPU",
            value=device,
            remedy='Use "compile", or the device cuda with pip install "hcma-fast[gpu]".',
        )


def gradient_engine(name: str, components: Components, spec: IOSpec, device: str) -> Engine:
    """The graph `align` by another gradient backend.

    Args:
        name: one of ``config.GRAD_BACKENDS``. ``eager``: autograd. ``compile``: forward and
            backward traced as one graph, and compiled by torch.compile at the first call, for any
            batch. ``triton``: the same, with both losses and their gradient in one launch of
            ``kernels.cosine_loss``, and the pooling over boxes by ``kernels.region_pool``.
            ``onnx``: the exported graph, by ONNX Runtime, from the cache.
        spec: of the graph that is replaced.

    Raises:
        BackendError: see :func:`check_grad_backend`; ONNX Runtime is missing.
    """
    check_grad_backend(name, device)
    if name == "onnx":
        return _onnx_engine(components, device)
    normalized = components.settings.normalized
    step = AlignStep(components.own_aligner, normalized=normalized).to(device)
    if name == "triton":
        step.losses, step.pool = cosine_loss_op, region_pool
    if name == "eager":
        return EagerEngine(step, spec)
    from hcma_fast.export.onnx.trace import example_inputs, trace_gradient

    example = tuple(value.to(device) for value in example_inputs(spec))
    traced = trace_gradient(step, example)
    traced.compile(dynamic=True)
    return EagerEngine(traced, spec)


def _onnx_engine(components: Components, device: str) -> Engine:
    from hcma_fast.export.cache import find_or_build
    from hcma_fast.export.open import open_engine
    from hcma_fast.export.target import Target

    target = Target(backend="onnxruntime")
    opened = find_or_build(components.weights_hash, lambda: components, target)
    return open_engine(opened, "align", device)
