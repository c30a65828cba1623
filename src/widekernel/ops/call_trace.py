"""Tracing: a record of the operator calls that ran, and of the backend of each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from widekernel.ops.problem import Problem


@dataclass(frozen=True)
class FusedCall:
    """A native call that computed a part of a fused block.

    Attributes:
        shape: shape of its input.
        activation: name of the activation, "none" for none.
        norm: whether it normalized its input.
        pair: whether it computed two layers instead of one.
        residual: whether it added a residual.
        patches: whether the first of the layers was a convolution over patches.
        norm_after: whether it normalized the results of the first layer.
        gate: whether squeeze-excite came first, in a native call of its own.
        response: whether a response norm preceded the second layer.
        precision: type of the factors of its products.
        depthwise: whether it computed a depthwise convolution, and no products.
    """

    shape: tuple[int, ...]
    activation: str
    norm: bool
    pair: bool
    residual: bool
    patches: bool = False
    norm_after: bool = False
    gate: bool = False
    response: bool = False
    precision: str = "float32"
    depthwise: bool = False


@dataclass(frozen=True)
class PointwiseGradCall:
    """A call that computed the gradients of a pointwise layer's weight and bias.

    Attributes:
        backend: "native" for our kernels, "portable" for PyTorch's.
        shape: shape of the layer's input.
        outputs: number of its output channels.
    """

    backend: str
    shape: tuple[int, ...]
    outputs: int


@dataclass(frozen=True)
class PartialCall:
    """A native call that convolved some channels of an image and passed the others on.

    Attributes:
        shape: shape of the image.
        selected: number of channels that it convolved.
    """

    shape: tuple[int, ...]
    selected: int


@dataclass
class Trace:
    """The calls that ran inside a `trace()` block, in order.

    Attributes:
        calls: the operator calls, each with the name of its backend.
        fused: the native calls of fused blocks.
        pointwise_grads: the calls for gradients of pointwise layers.
        partial: those of `calls` that read their channels from a larger image and passed on the others, in native code.
        batch_norms: the shapes of the maps that our kernels normalized in training.
    """

    calls: list[tuple[str, Problem]] = field(default_factory=list)
    fused: list[FusedCall] = field(default_factory=list)
    pointwise_grads: list[PointwiseGradCall] = field(default_factory=list)
    partial: list[PartialCall] = field(default_factory=list)
    batch_norms: list[tuple[int, ...]] = field(default_factory=list)

    def backends(self, op: str | None = None) -> list[str]:
        """Return the name of the backend of every recorded call, or of the calls of one operator."""
        return [backend for backend, problem in self.calls if op in (None, problem.op)]


OPEN_TRACES: list[Trace] = []
"""The open traces. Callers of `record` check this list first, because it is nearly always empty."""
_LOCK = threading.Lock()


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every operator call made inside the block, on any thread, with the backend that computed it."""
    recorded = Trace()
    with _LOCK:
        OPEN_TRACES.append(recorded)
    try:
        yield recorded
    finally:
        with _LOCK:
            OPEN_TRACES[:] = [open_trace for open_trace in OPEN_TRACES if open_trace is not recorded]


def record(backend: str, problem: Problem) -> None:
    """Add a call to every open trace."""
    with _LOCK:
        for open_trace in OPEN_TRACES:
            open_trace.calls.append((backend, problem))


def record_fused(call: FusedCall) -> None:
    """Add a call of a fused block to every open trace."""
    with _LOCK:
        for open_trace in OPEN_TRACES:
            open_trace.fused.append(call)


def record_pointwise_grad(call: PointwiseGradCall) -> None:
    """Add a call for gradients of a pointwise layer to every open trace."""
    with _LOCK:
        for open_trace in OPEN_TRACES:
            open_trace.pointwise_grads.append(call)


def record_partial(call: PartialCall) -> None:
    """Add a native call for some channels to every open trace."""
    with _LOCK:
        for open_trace in OPEN_TRACES:
            open_trace.partial.append(call)


def record_batch_norm(shape: tuple[int, ...]) -> None:
    """Add a batch norm in training to every open trace."""
    with _LOCK:
        for open_trace in OPEN_TRACES:
            open_trace.batch_norms.append(shape)
