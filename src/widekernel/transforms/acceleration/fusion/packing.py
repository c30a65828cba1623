"""Packing of weights for the native calls of fused blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from widekernel.ops.cpu import library as native
from widekernel.ops.cpu.gate import Gate
from widekernel.ops.cpu.pointwise import PackedBlock
from widekernel.transforms.acceleration.fusion.weights import BlockWeights


def missing() -> str | None:
    """Return why there are no native calls on this machine; None if there are."""
    return native.load().reason


def pack(weights: BlockWeights) -> Callable[..., Tensor]:
    """Return a function that computes the products of these weights, and the gate before them, as `ReferenceBlock` does."""
    *products, gate_weights = weights
    block = PackedBlock(*products)
    if gate_weights is None:
        return block
    gate = Gate(*gate_weights)
    return lambda x, residual=None: block(x, residual, gate(x))
