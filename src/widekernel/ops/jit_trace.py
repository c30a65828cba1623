"""Inspecting tensors while `torch.jit.trace` records a graph, without adding to the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_tracing() -> bool:
    """Return whether `torch.jit.trace`, or something built on it, is recording a graph."""
    return torch._C._get_tracing_state() is not None


@contextmanager
def tracing_paused() -> Iterator[None]:
    """Suspend recording inside the block; tensor sizes are plain integers there."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def static_shape(tensor: Tensor) -> list[int]:
    """Return the shape of a tensor as integers, which become constants of a recorded graph; TorchScript can compile it."""
    if torch.jit.is_scripting():
        return tensor.size()  # type: ignore[return-value]
    else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
        return eager_static_shape(tensor)


def eager_static_shape(tensor: Tensor) -> Any:
    """Return the same as `static_shape`, faster, for callers that TorchScript does not compile."""
    if torch._C._get_tracing_state() is None:
        return tensor.shape
    with tracing_paused():
        return tensor.shape
